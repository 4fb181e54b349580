"""Reading run directories.

Everything is read as plain JSON and YAML. A missing or damaged file does not prevent the others
from being read: it is reported in `Run.problems`.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from moco_common.config import MAX_BYTES, parse_yaml
from moco_common.errors import UserError
from moco_common.files import parse_json, read_json, read_regular, read_text
from moco_det.config.defaults import flatten

LARGEST = 1e100
FILES = ("config.yaml", "metrics.json", "results.json")


@dataclass
class Run:
    """One run directory.

    Attributes:
        config: flattened config.yaml ("SOLVER.BASE_LR" -> 0.02); {} if there is none.
        records: metrics.json: a dict of scalars per iteration, in their order.
        results: results.json; None if the run was not evaluated or the file is unreadable.
        problems: one sentence per file that could not be read.
        home: the run that was trained; differs from `path` for results on another test set, which
            are in a folder of the run.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, float]] = field(default_factory=list)
    results: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    home: Path | None = None

    @property
    def label(self) -> str:
        """The name of the directory without its seed or trial part."""
        return strip_trial(self.home or self.path, self.seed)

    @property
    def is_pretraining(self) -> bool:
        """True for a pre-training run, which has neither boxes nor results."""
        if self.results is not None or any("total_loss" in record for record in self.records):
            return False
        configured = not self.config.keys().isdisjoint(("METHOD", "MOCO.QUEUE_SIZE"))
        return configured or any("accuracy" in record for record in self.records)

    @property
    def chance_loss(self) -> float | None:
        """Loss of an encoder that has learned nothing, if this is a pre-training run whose method
        has such a loss."""
        if not self.is_pretraining:
            return None
        recorded = self.series("chance_loss")[1]
        if recorded:
            return recorded[-1]
        # Runs of earlier versions did not record it: log(K+1) where the configuration has K.
        negatives = {"moco": "MOCO.QUEUE_SIZE", "memory-bank": "BANK.NEGATIVES"}
        k = self.config.get(negatives.get(str(self.config.get("METHOD", "moco")), ""))
        return math.log(k + 1) if is_number(k) and k > 0 else None

    @property
    def seed(self) -> int | None:
        """The seed; None if it is unknown or was drawn at random (-1 in Detectron2)."""
        seed = (self.results or {}).get("seed", self.config.get("SEED"))
        return seed if isinstance(seed, int) and seed >= 0 else None

    @property
    def weights(self) -> str:
        """The initial weights; "" for random ones."""
        return str((self.results or {}).get("weights", self.config.get("MODEL.WEIGHTS")) or "")

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Iterations and values of one scalar of metrics.json, where it is a number."""
        points = [(r["iteration"], r[key]) for r in self.records if is_number(r.get(key))]
        return [p[0] for p in points], [p[1] for p in points]

    def scores(self) -> dict[str, float]:
        """The scores of results.json that are numbers: {"bbox/AP": percent, "segm/AP": ...}."""
        return {
            f"{task}/{name}": float(value)
            for task, scores in (self.results or {}).items()
            if isinstance(scores, dict)
            for name, value in scores.items()
            if is_number(value)
        }

    def per_class(self, task: str = "bbox") -> dict[str, float]:
        """AP by class name for one task; {} if results.json has none."""
        scores = (self.results or {}).get(task)
        classes = scores.get("per_class") if isinstance(scores, dict) else None
        items = classes.items() if isinstance(classes, dict) else ()
        return {str(name): float(value) for name, value in items if is_number(value)}


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read run directories, the trials (`trial_K`) inside them, and their results on further test
    sets (`test-NAME`), in the order given.

    Raises:
        UserError: a path is not a directory, or holds no run.
    """
    runs: dict[Path, Run] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path} is not a run directory: pass the output directories of runs")
        trials = [p for p in path.glob("trial_*") if p.is_dir() and p.name[6:].isdigit()]
        found = [
            p for p in (path, *sorted(trials, key=lambda p: int(p.name[6:]))) if _is_run_dir(p)
        ]
        if not found:
            inside = sorted(p for p in path.iterdir() if p.is_dir() and _is_run_dir(p))
            hint = f"; it contains run directories: pass {path}/*" if inside else ""
            raise UserError(
                f"{path} holds no run (no config.yaml, metrics.json or results.json){hint}"
            )
        for directory in found:
            runs.setdefault(directory.resolve(), read_run(directory))
            for file in sorted(directory.glob("test-*/results.json")):
                runs.setdefault(file.parent.resolve(), _read_other_results(file.parent))
    return list(runs.values())


def read_run(path: str | Path) -> Run:
    """Read one run directory; files that cannot be read are reported in `problems`."""
    run = Run(Path(path))
    run.config = _read_config(run)
    run.records = _read_metrics(run)
    run.results = _read_results(run)
    return run


def _read_other_results(folder: Path) -> Run:
    """Read the results of a run on another test set than its own."""
    run = Run(folder, config=read_run(folder.parent).config, home=folder.parent)
    run.results = _read_results(run)
    return run


def input_files(runs: Iterable[Run]) -> list[Path]:
    """The files of runs, and those that the names of their test sets contain."""
    files = [run.path / name for run in runs for name in FILES]
    names = {str(run.results["dataset"]) for run in runs if run.results}
    return files + [Path(part) for name in names for part in name.split(":")]


def strip_trial(path: str | Path, seed: int | None = None) -> str:
    """Return a directory's name without `-seed0`, `_trial_3`, or its bare seed (`_0` with seed 0).

    A bare number other than the seed is kept: `resnet_50` is a name. A directory that is only a
    trial (`trial_0`) takes the name of its parent.
    """
    path = Path(path).resolve()
    name = re.sub(r"(^|[-_.])(seed|trial|run)[-_.=]?\d+$", "", path.name, flags=re.IGNORECASE)
    if name == path.name and seed is not None:
        name = re.sub(rf"(^|[-_.])0*{seed}$", "", name)
    if name or path.parent == path:
        return name or path.name
    return strip_trial(path.parent, seed)


def _is_run_dir(path: Path) -> bool:
    return any((path / name).exists() for name in FILES)


def _read_config(run: Run) -> dict[str, Any]:
    file = run.path / "config.yaml"
    if not file.exists():
        return {}
    try:
        tree = _checked(parse_yaml(read_regular(file, MAX_BYTES).decode("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        run.problems.append(f"{file} is not readable as YAML ({_first_line(error)})")
        return {}
    return flatten(tree) if isinstance(tree, dict) else {}


def _read_metrics(run: Run) -> list[dict[str, float]]:
    """Read one JSON object per line; after a resume, newer records of an iteration count."""
    file = run.path / "metrics.json"
    if not file.exists():
        return []
    try:
        lines = read_text(file).splitlines()
    except UserError as error:
        run.problems.append(f"{file} is not readable ({_first_line(error)})")
        return []
    records: list[dict[str, float]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line) if line.strip() else None
        except ValueError:
            cut = ": the run was interrupted while writing" if number == len(lines) else ""
            run.problems.append(f"{file}, line {number}, is not JSON and is left out{cut}")
            continue
        if not isinstance(record, dict) or not is_number(record.get("iteration")):
            continue
        while records and records[-1]["iteration"] >= record["iteration"]:
            earlier = records.pop()
            if earlier["iteration"] == record["iteration"]:  # evaluation adds scalars to it
                record = {**earlier, **record}
        records.append(record)
    return records


def _read_results(run: Run) -> dict[str, Any] | None:
    file = run.path / "results.json"
    if not file.exists():
        return None
    try:
        results: dict[str, Any] = _checked(read_json(file))
    except (OSError, ValueError) as error:
        run.problems.append(
            f"{file} is incomplete or not JSON ({_first_line(error)}) and is left out: "
            "evaluate the run again (--eval-only)"
        )
        return None
    needed = ("protocol", "dataset")
    missing = [key for key in needed if not isinstance(results, dict) or key not in results]
    if missing:
        run.problems.append(f"{file} lacks {' and '.join(missing)}: the run is left out")
        return None
    return results


def is_number(value: Any) -> TypeGuard[float]:
    """Return True for a number that can be averaged and drawn: not NaN, nor beyond 1e100."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _checked(tree: Any) -> Any:
    """Return what a file holds; raise ValueError if it cannot be written as text again."""
    json.dumps(tree, ensure_ascii=False, default=str).encode()
    return tree


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
