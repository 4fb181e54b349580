"""Where a step goes: named stages, a clock for them, and the profiler of a run.

A stage is named ``kind: what``. The kinds are ``data``, ``encoders``, ``machinery`` (all that a
method adds to its encoders) and ``communication``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from moco_common import comm
from moco_common.errors import UserError
from moco_common.text import counted

T = TypeVar("T")
_clock: StageClock | None = None  # the one that runs, if any; stages report to it


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Name what runs inside, for the clock and for traces. Costs some microseconds."""
    with record_function(name):
        if _clock is None:
            yield
        else:
            with _clock.charge(name):
                yield


class StageClock:
    """Adds up the seconds that each stage takes inside ``with clock:``.

    A stage is charged for its own time only, not for the stages inside it. A GPU is waited for at
    both ends of a stage, so that its work is charged to the stage that asked for it.

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
        """Count what runs inside as a stage's own time."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> float:
        """Charge the time since the last call to the innermost stage; return the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
        return now

    def share(self, kind: str) -> float:
        """Share of the total that the stages of this kind took, in [0, 1]."""
        spent = sum(value for name, value in self.seconds.items() if name.startswith(f"{kind}:"))
        return spent / self.total

    def table(self, steps: int) -> str:
        """One line a stage, by kind, with milliseconds a step and the share of the whole."""
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
    """Tells where the steps of a run go, then lets the run go on.

    After some steps of warm-up, ``steps`` steps are timed by stage, and as many are traced
    afterwards (a trace slows down what it sees). Rank 0 writes ``folder/trace.json``, which
    chrome://tracing and Perfetto open, and says the table; every rank must take part.

    Args:
        folder: of the run.
        steps: to time, and to trace, at least 1.
        warmup: steps before.
        say: takes the lines that are to be read.

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
        self.steps, self.say = steps, say
        self.clock = StageClock()
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._trace = profile(activities=activities)
        self._begin, self._middle, self._end = warmup, warmup + steps, warmup + 2 * steps
        self._done = 0

    def watch_data(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; waiting for each is a stage."""
        iterator = iter(batches)
        while True:
            with stage("data: waiting"):
                batch = next(iterator, _NO_MORE)
            if batch is _NO_MORE:
                break
            yield batch  # type: ignore[misc]
        self._advance()
        if self._done < self._end:
            self._stop()
            if comm.rank() == 0:
                self.say(
                    f"warning: --profile {self.steps} tells nothing, because it needs {self._end} "
                    f"iterations and the run ended after {self._done}"
                )

    def watch_step(self, take_step: Callable[..., T]) -> Callable[..., T]:
        """The same step, which times and traces itself."""

        def watched(*args: Any, **kwargs: Any) -> T:
            self._advance()
            self._done += 1
            return take_step(*args, **kwargs)

        return watched

    def _advance(self) -> None:
        """At the end of a step and what follows it: begin or end what is due then."""
        if self._done == self._begin:
            self.clock.__enter__()
        elif self._done == self._middle:
            self.clock.__exit__()
            self._trace.start()
        elif self._done == self._end:
            self._trace.stop()
            if comm.rank() == 0:
                self._report()

    def _stop(self) -> None:
        if self._begin <= self._done < self._middle:
            self.clock.__exit__()
        elif self._middle <= self._done < self._end:
            self._trace.stop()

    def _report(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished.json")
        self._trace.export_chrome_trace(str(unfinished))
        unfinished.replace(self.path)
        self.say(f"profile of {counted(self.steps, 'iteration')}, each on average:")
        self.say(self.clock.table(self.steps))
        self.say(f"trace of the {self.steps} after them: {self.path}")


_NO_MORE = object()
