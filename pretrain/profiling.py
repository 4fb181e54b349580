"""Time per stage of a training step, and the profiler of a run.

A stage is named ``kind: what``. The kinds are ``data``, ``encoders``, ``machinery`` (what a method
adds to its encoders) and ``communication``.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from moco_common import comm
from moco_common.errors import UserError
from moco_common.text import counted

T = TypeVar("T")
_clock: StageClock | None = None  # the running clock, if any, to which stages report


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Name the enclosed code for the clock and for traces, at a cost of some microseconds."""
    with record_function(name):
        if _clock is None:
            yield
        else:
            with _clock.charge(name):
                yield


class StageClock:
    """Total of the seconds that each stage takes inside ``with clock:``.

    A stage is charged for its own time only, not for that of nested stages. A GPU is synchronised
    at both ends of a stage, so that its work is charged to the stage that launched it.

    Attributes:
        seconds: by name of the stage.
        total: seconds between entering and leaving the clock.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.total = 0.0
        self._open: list[str] = []
        self._since = self._start = 0.0

    def __enter__(self) -> StageClock:
        global _clock
        _clock = self
        self._start = self._settle()
        return self

    def __exit__(self, *_: object) -> None:
        global _clock
        _clock = None
        self.total += self._settle() - self._start

    @contextmanager
    def charge(self, name: str) -> Iterator[None]:
        """Charge the enclosed code to a stage."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> float:
        """Charge the time since the last call to the innermost stage; return the time."""
        if comm.device().type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
        return now

    def share(self, kind: str) -> float:
        """Fraction of the total that the stages of this kind took, in [0, 1]."""
        spent = sum(value for name, value in self.seconds.items() if name.startswith(f"{kind}:"))
        return spent / self.total

    def table(self, steps: int) -> str:
        """Format one line per stage, by kind, with milliseconds per step and the fraction of the
        total."""
        rest = self.total - sum(self.seconds.values())
        rows = sorted([*self.seconds.items(), ("rest: outside all stages", rest)], key=_place)
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            f"  {name:{width}s} {1e3 * value / steps:10.2f} ms {value / self.total:7.2%}"
            for name, value in [*rows, ("step", self.total)]
        )


_KINDS = ("data", "encoders", "machinery", "communication", "rest")


def _place(row: tuple[str, float]) -> tuple[int, float]:
    kind = row[0].partition(":")[0]
    return (_KINDS.index(kind) if kind in _KINDS else len(_KINDS), -row[1])


class Profiler:
    """Profile some steps of a run without changing it.

    After the warm-up, ``steps`` steps are timed by stage; as many are traced after them, because a
    trace slows down what it records. Rank 0 writes ``folder/trace.json``, for chrome://tracing or
    Perfetto, and prints the table; every rank must take part.

    Args:
        folder: of the run.
        steps: number of steps to time, and to trace, at least 1.
        warmup: steps before them.
        say: prints a line.

    Raises:
        UserError: ``steps`` is below 1.
    """

    def __init__(
        self,
        folder: str | Path,
        steps: int,
        *,
        warmup: int = 3,
        say: Callable[[str], None] = print,
    ) -> None:
        if steps < 1:
            raise UserError(f"--profile {steps} profiles nothing: give 1 or more iterations.")
        self.path = Path(folder) / "trace.json"
        self.steps, self.warmup, self.say = steps, warmup, say
        self.clock = StageClock()
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        with warnings.catch_warnings():
            # The steps before the traced ones are timed, so the tracer must not warm up in them.
            warnings.filterwarnings("ignore", message="Profiler won't be using warmup")
            phases = schedule(wait=warmup + steps, warmup=0, active=steps, repeat=1)
        self._trace = profile(activities=activities, schedule=phases, on_trace_ready=self._report)
        self._needed = warmup + 2 * steps
        self._done = 0  # complete steps

    def watch_data(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the same batches; waiting for each is a stage."""
        iterator = iter(batches)
        while True:
            with stage("data: waiting"):
                batch = next(iterator, _NO_MORE)
            if batch is _NO_MORE:
                break
            yield batch  # type: ignore[misc]
        self._advance()
        self._trace.stop()
        if self._done < self._needed:
            if self.warmup <= self._done < self.warmup + self.steps:
                self.clock.__exit__()
            if comm.rank() == 0:
                self.say(
                    f"warning: --profile {self.steps} reports nothing, because it needs "
                    f"{self._needed} iterations and the run ended after {self._done}"
                )

    def watch_step(self, take_step: Callable[..., T]) -> Callable[..., T]:
        """Wrap a step so that it is timed and traced."""

        def watched(*args: Any, **kwargs: Any) -> T:
            self._advance()
            self._done += 1
            return take_step(*args, **kwargs)

        return watched

    def _advance(self) -> None:
        if self._done == self.warmup:
            self.clock.__enter__()
        elif self._done == self.warmup + self.steps:
            self.clock.__exit__()
        if self._done:
            self._trace.step()
        else:
            self._trace.start()

    def _report(self, trace: profile) -> None:
        if self._done < self._needed or comm.rank() != 0:  # a run that is too short ends the trace
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished.json")
        trace.export_chrome_trace(str(unfinished))
        unfinished.replace(self.path)
        self.say(f"profile of {counted(self.steps, 'iteration')}, average of each:")
        self.say(self.clock.table(self.steps))
        self.say(f"trace of the {self.steps} after them: {self.path}")


_NO_MORE = object()
