"""Mutation testing: small changes to the code, each of which a test must notice.

    python -m tests.mutation --mutants 20 pretrain/losses.py

`modules.yaml` names the modules and the tests that exercise each. A seeded sample of a module's
mutants is written, one after another, into a copy of the checkout; the tests run there until one
fails, in forks of this process, which has imported torch and Detectron2 but nothing of the
project. Tests that execute the changed lines come first. A mutant that no test notices survives:
either a test is missing, or the change makes no difference, which `equivalent.yaml` then explains.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import ctypes
import gc
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any, NoReturn

import yaml

from tests.mutation.operators import Mutant, mutants

ROOT = Path(__file__).parents[2]
OURS = ("moco_common", "pretrain", "moco_det", "tests", "tools", "benchmarks")
SLOW_IMPORTS = (
    *("torch._dynamo", "torch.utils.tensorboard", "torchvision", "detectron2.engine", "cv2"),
    *("detectron2.evaluation", "detectron2.modeling", "detectron2.model_zoo", "coverage"),
    *("fvcore.nn.precise_bn", "lightly.loss", "scipy.stats", "sklearn", "matplotlib.pyplot"),
    *("hypothesis", "pytest", "pytest_timeout", "safetensors.torch", "yaml", "PIL.Image"),
)
PR_SET_CHILD_SUBREAPER = 36
KILLED, TIMEOUT, SURVIVED = "killed", "timeout", "SURVIVED"


@dataclass
class Baseline:
    """What the tests of a module do on the unchanged code.

    Attributes:
        seconds: duration of each test.
        covering: names of the tests that execute each line.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    covering: dict[int, set[str]] = field(default_factory=dict)


class Recorder:
    """A pytest plugin that measures a `Baseline`, with coverage of one file, test by test."""

    def __init__(self, module: Path) -> None:
        import coverage

        self.module, self.baseline = module, Baseline()
        self.coverage = coverage.Coverage(data_file=None, include=[str(module)], config_file=False)
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        seconds = self.baseline.seconds
        seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration

    def result(self) -> Baseline:
        self.coverage.stop()
        lines = self.coverage.get_data().contexts_by_lineno(str(self.module))
        self.baseline.covering = {line: set(tests) - {""} for line, tests in lines.items()}
        return self.baseline


class Selection:
    """A pytest plugin that runs these tests, fast ones first, each with a limit on its time."""

    def __init__(self, names: Collection[str], seconds: dict[str, float]) -> None:
        self.names, self.seconds = names, seconds

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        import pytest

        items[:] = [item for item in items if item.nodeid in self.names]
        items.sort(key=lambda item: self.seconds[item.nodeid])
        for item in items:
            limit = 30 + 5 * self.seconds[item.nodeid]
            item.add_marker(pytest.mark.timeout(limit, method="thread"), append=False)


class Workshop:
    """A copy of the checkout in which modules are changed and tests run."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.output = folder / "tree", folder / "output.txt"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.tree / name)
        # Checked by content: two mutants may have the same size and time of change.
        compileall.compile_dir(
            self.tree, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH
        )

    def measure(self, module: str, tests: list[str]) -> Baseline:
        """Run the tests on the unchanged code, on which they must pass."""
        result = self.output.with_suffix(".baseline")

        def work() -> int:
            recorder = Recorder(self.tree / module)
            code = self._pytest(tests, recorder)
            baseline = recorder.result()
            result.write_text(repr((baseline.seconds, baseline.covering)))
            return code

        if self._in_fork(work, 3600):
            raise SystemExit(f"tests of the unchanged {module} fail:\n{self.output.read_text()}")
        return Baseline(*eval(result.read_text(), {"set": set}))

    def try_out(self, module: str, mutant: Mutant, baseline: Baseline) -> str:
        """Run the tests on a mutant until one fails: first those that execute the changed lines,
        then the others, which may do so in processes that they start."""
        first, last = mutant.lines
        lines = (baseline.covering.get(line, set()) for line in range(first, last + 1))
        covering = set[str]().union(*lines) & baseline.seconds.keys()
        path = self.tree / module
        original = path.read_bytes()
        path.write_text(mutant.source, encoding="utf-8")
        try:
            for names in (covering, baseline.seconds.keys() - covering):
                outcome = self._outcome(names, baseline) if names else SURVIVED
                if outcome != SURVIVED:
                    return outcome
        finally:
            path.write_bytes(original)
        return SURVIVED

    def _outcome(self, names: Collection[str], baseline: Baseline) -> str:
        files = sorted({name.partition("::")[0] for name in names})
        selection = Selection(names, baseline.seconds)
        limit = 120 + 5 * sum(baseline.seconds[name] for name in names)
        code = self._in_fork(lambda: self._pytest(files, selection), limit)
        if code is None or "Timeout >" in self.output.read_text(errors="replace"):
            return TIMEOUT
        return KILLED if code else SURVIVED

    def _pytest(self, tests: list[str], plugin: Any) -> int:
        import pytest

        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        plugins = ("pytest_timeout", "no:cacheprovider", "no:unraisableexception")
        words = [word for name in plugins for word in ("-p", name)]
        return int(pytest.main(["-x", *words, *tests], plugins=[plugin]))

    def _in_fork(self, work: Callable[[], int], limit: float) -> int | None:
        """Exit code of ``work()`` in a process of its own; None if it exceeds the limit."""
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._settle_in()
            _exit_with(work)
        end, code = time.monotonic() + limit, None
        while time.monotonic() < end:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.05)
        _end_children()
        return code

    def _settle_in(self) -> None:
        """Make this fork a process that was started in the copy."""
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        handle = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(self.tree)
        os.environ["PYTHONPATH"] = str(self.tree)
        sys.path[:] = [str(self.tree), *(p for p in sys.path if p not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
        importlib.invalidate_caches()
        _prefork()


def _exit_with(work: Callable[[], int | None]) -> NoReturn:
    """End this fork as Python ends a process, but without going back to what it was forked from."""
    code: Any = 1
    try:
        code = work()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _prefork() -> None:
    """Replace the servers of `tests.pretrain.forks`, which import torch anew, by forks."""
    from tests.moco_det.ranks import DetectionFork
    from tests.pretrain.forks import Fork, serve

    for kind in (Fork, DetectionFork):
        (requests, to_server), (replies, from_server) = os.pipe(), os.pipe()
        if os.fork() == 0:
            os.dup2(requests, 0)
            os.dup2(from_server, 1)
            for pipe in (requests, to_server, replies, from_server):
                os.close(pipe)
            if sys.stdin.buffer.peek(1):  # the first request, if there is one
                _exit_with(partial(serve, kind.preloaded))
            os._exit(0)
        os.close(requests)
        os.close(from_server)
        kind.server = types.SimpleNamespace(
            stdin=os.fdopen(to_server, "wb"), stdout=os.fdopen(replies, "rb")
        )


def _end_children() -> None:
    """Kill whatever a run of tests left, grandchildren included: orphans become ours."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while pids := [int(pid) for pid in children.read_text().split()]:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def load_yaml(name: str) -> Any:
    """Content of a table beside this file."""
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8")) or {}


def equivalent_keys(module: str) -> set[tuple[str, str, str]]:
    """Keys of the mutants of a module that are known to make no difference."""
    listed = load_yaml("equivalent.yaml").get(module, [])
    return {(entry["in"], entry["before"], entry["after"]) for entry in listed}


def preload() -> None:
    """Import what takes seconds and is not of the project."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in SLOW_IMPORTS:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.freeze()  # no fork searches these objects for garbage, or copies their pages


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("modules", nargs="*", help="files or folders; default: all of the table")
    parser.add_argument("--mutants", type=int, default=20, help="sample size for each module")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--match", help="only mutants whose change contains this text, all of them")
    args = parser.parse_args(argv)
    table = load_yaml("modules.yaml")
    wanted = tuple(args.modules)
    args.table = {name: tests for name, tests in table.items() if name.startswith(wanted or "")}
    if not args.table:
        parser.error(f"modules.yaml names none of {', '.join(wanted)}")
    return args


def chosen(module: str, args: argparse.Namespace) -> list[Mutant]:
    """The mutants of a module to try, in the order of its source."""
    known = equivalent_keys(module)
    every = list(mutants((ROOT / module).read_text(encoding="utf-8")))
    for function, before, after in known - {mutant.key for mutant in every}:
        print(f"equivalent.yaml is out of date: {module} {function}: {before} -> {after}")
    new = [mutant for mutant in every if mutant.key not in known]
    if args.match:
        return [m for m in new if args.match in f"{m.function}: {m.before} -> {m.after}"]
    places = random.Random(f"{args.seed} {module}").sample(
        range(len(new)), min(args.mutants, len(new))
    )
    return [new[place] for place in sorted(places)]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which removes the copy
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    preload()
    rows, survivors = [], []
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        workshop = Workshop(Path(folder))
        for module, tests in args.table.items():
            sample = chosen(module, args)
            if not sample:
                continue
            baseline = workshop.measure(module, tests)
            counts = dict.fromkeys((KILLED, TIMEOUT, SURVIVED), 0)
            print(f"{module}: {sum(baseline.seconds.values()):.0f} s of tests", flush=True)
            for mutant in sample:
                began = time.monotonic()
                outcome = workshop.try_out(module, mutant, baseline)
                counts[outcome] += 1
                line = (
                    f"{outcome:8} {module}:{mutant.lines[0]} {mutant.function}: "
                    f"{mutant.before} -> {mutant.after}"
                )
                print(f"{line}  ({time.monotonic() - began:.0f} s)", flush=True)
                if outcome == SURVIVED:
                    survivors.append(line)
            rows.append((module, counts))
    for module, counts in rows:
        total = sum(counts.values())
        print(
            f"{module}: {total - counts[SURVIVED]} of {total} killed"
            f" ({counts[TIMEOUT]} by time), {len(equivalent_keys(module))} known equivalent"
        )
    total = sum(sum(counts.values()) for _, counts in rows)
    print(f"mutation: {total - len(survivors)} of {total} killed, {len(survivors)} survived")
    print("\n".join(survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
