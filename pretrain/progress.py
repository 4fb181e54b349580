"""What a run says while it goes: progress lines, metrics.json, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from pretrain.files import append_text, full_disk_explained, replace_text

METRICS = "metrics.json"
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}"  # the lines tell the time left
LOOP = "{desc} {percentage:3.0f}%|{bar}| eta {remaining}{postfix}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def silent(text: str) -> None:
    """What says nothing, in the place of ``print``."""


class Loop:
    """How far a loop over ``total`` things is: in a terminal a bar, elsewhere a line now and then.
    To be used with ``with``, that no bar is left behind.

    Args:
        what: they begin with.
        say: takes the lines; a bar only comes in the place of ``print``.
        period: seconds between two lines; a bar's words change more often.
    """

    def __init__(
        self, what: str, total: int, say: Callable[[str], None] = print, period: float = 3.0
    ) -> None:
        self.what, self.total, self.say, self.period = what, total, say, period
        self._began = self._said = time.monotonic()
        self._bar = tqdm(
            desc=what,
            total=total,
            file=sys.stdout,
            disable=say is not print or not sys.stdout.isatty(),
            leave=False,
            dynamic_ncols=True,
            bar_format=LOOP,
        )

    def at(self, done: int) -> bool:
        """So many are done; whether it is time to `tell` of it."""
        now = time.monotonic()
        self._done, self.rate = done, done / max(now - self._began, 1e-9)  # and how many a second
        self._bar.update(done - self._bar.n)
        if now - self._said < (self.period if self._bar.disable else 0.5):
            return False
        self._said = now
        return True

    def tell(self, text: str) -> None:
        """A line with this and the time left, or this beside the bar."""
        if self._bar.disable:
            left = clock((self.total - self._done) / self.rate)
            self.say(f"{self.what}: {text}  eta {left}")
        else:
            self._bar.set_postfix_str(text)

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class Progress:
    """Records scalars of a run that has ``total`` steps and may start at ``start``.

    Lines of metrics.json from beyond ``start`` (steps that a killed run did after its last
    checkpoint) are dropped, so a resumed run leaves the record of one run.

    Args:
        quiet: print nothing but warnings.
        stream: for what is said; warnings go to standard error. In a terminal a bar of the steps
            stays below the lines; a file gets the lines alone.
        now: seconds of a clock.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        total: int,
        batch_size: int,
        quiet: bool = False,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, needed only here

        self.total, self.batch_size, self.quiet, self.now = total, batch_size, quiet, now
        self.stream = stream or sys.stdout
        self.bar = None
        if self.stream.isatty() and not quiet:
            shape = {"leave": False, "dynamic_ncols": True, "bar_format": BAR}
            self.bar = tqdm(total=total, initial=start, file=self.stream, **shape)
        self.path = folder / METRICS
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                record = _record(line)
                if record is not None and record["iteration"] <= start:
                    kept.append(line + "\n")
        replace_text(self.path, "".join(kept))
        self.writer = SummaryWriter(str(folder), purge_step=start)
        self.begin(start)

    def begin(self, step: int) -> None:
        """Start the clock at ``step`` steps done: again after the first step of a process, which
        pays for its start (workers, memory, compilation)."""
        self._step, self._time = step, self.now()
        self._recent: deque[tuple[int, float]] = deque(maxlen=50)  # steps and seconds of each line

    def advance(self) -> None:
        """One step more is done."""
        if self.bar is not None:
            self.bar.update()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock meanwhile: for evaluations, which say nothing about the pace."""
        began = self.now()
        try:
            yield
        finally:
            self._time += self.now() - began

    def log(self, step: int, text: str, **scalars: float) -> None:
        """Print one line for ``step`` steps done and record ``scalars`` with it.

        The time left is told from the pace of the last fifty lines.
        """
        steps, seconds = step - self._step, max(self.now() - self._time, 1e-9)
        if steps:
            self._recent.append((steps, seconds))
        self._step, self._time = step, self.now()
        pace = sum(s for _, s in self._recent) / max(1, sum(n for n, _ in self._recent))
        rate = scalars["images_per_second"] = steps * self.batch_size / seconds
        eta = clock(pace * (self.total - step))
        width = len(str(self.total))
        self.say(f"iter {step:>{width}}/{self.total}  {text}  {rate:.0f} images/s  eta {eta}")
        append_text(self.path, json.dumps({"iteration": step, **scalars}) + "\n")
        with full_disk_explained(self.path.parent):
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """Print a line, unless the run is quiet."""
        if not self.quiet:
            self._print(text, self.stream)

    def warn(self, text: str) -> None:
        """Print a warning on standard error, quiet or not."""
        self._print(f"warning: {text}", sys.stderr)

    def _print(self, text: str, stream: TextIO) -> None:
        if self.bar is None:
            print(text, file=stream, flush=True)
        else:
            tqdm.write(text, file=stream)  # above the bar

    def close(self) -> None:
        """Write what TensorBoard has not yet been given, and take the bar away."""
        if self.bar is not None:
            self.bar.close()
        self.writer.close()


def read_records(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.json, but for the half one of a killed process."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [record for line in lines if (record := _record(line)) is not None]


def _record(line: str) -> dict[str, float] | None:
    """A line of metrics.json; None for the half line of a killed process."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "iteration" in record else None
