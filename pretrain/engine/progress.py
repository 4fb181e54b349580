"""The record of a run: progress lines, metrics.json, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from moco_common.files import append_text, full_disk_explained, parse_json, read_text, replace_text
from moco_common.progress import step_bar
from moco_common.text import duration

METRICS = "metrics.json"
LARGEST = 1e100  # of the numbers in it


class Progress:
    """Records scalars of a run that has ``total`` steps and may start at ``start``.

    Lines of metrics.json from beyond ``start`` (steps that a killed run did after its last
    checkpoint) are dropped, so a resumed run leaves the record of one run.

    Args:
        quiet: print nothing but warnings.
        stream: takes the lines; warnings go to standard error. In a terminal a bar of the steps
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
        shown = self.stream.isatty() and not quiet
        self.bar = step_bar(total, start, self.stream, shown=shown)
        self.path = folder / METRICS
        kept = []
        if self.path.exists():
            for line in read_text(self.path).splitlines():
                record = _record(line)
                if record is not None and record["iteration"] <= start:
                    kept.append(line + "\n")
        replace_text(self.path, "".join(kept))
        self.writer = SummaryWriter(str(folder), purge_step=start)
        self.begin(start)

    def begin(self, step: int) -> None:
        """Start the clock after ``step`` steps; called again after the first step of a process,
        whose time includes the start (workers, memory, compilation)."""
        self._step, self._time = step, self.now()
        self._recent: deque[tuple[int, float]] = deque(maxlen=50)  # steps and seconds of each line

    def advance(self) -> None:
        """Record that one more step is done."""
        self.bar.update()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock within ``with``, for evaluations, which do not count towards the pace."""
        began = self.now()
        try:
            yield
        finally:
            self._time += self.now() - began

    def log(self, step: int, text: str, **scalars: float) -> None:
        """Print a line after ``step`` steps and record ``scalars`` with it.

        The time left is estimated from the pace of the last fifty lines.
        """
        steps, seconds = step - self._step, max(self.now() - self._time, 1e-9)
        if steps:
            self._recent.append((steps, seconds))
        self._step, self._time = step, self.now()
        pace = sum(s for _, s in self._recent) / max(1, sum(n for n, _ in self._recent))
        rate = scalars["images_per_second"] = steps * self.batch_size / seconds
        eta = duration(pace * (self.total - step))
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
        if self.bar.disable:
            print(text, file=stream, flush=True)
        else:
            tqdm.write(text, file=stream)  # above the bar

    def close(self) -> None:
        """Flush TensorBoard's file and remove the bar."""
        self.bar.close()
        self.writer.close()


def read_records(path: Path) -> list[dict[str, float]]:
    """Return the records of a metrics.json, without the incomplete line of a killed process."""
    lines = read_text(path).splitlines()
    return [record for line in lines if (record := _record(line)) is not None]


def _record(line: str) -> dict[str, float] | None:
    """Parse a line of metrics.json: its numbers; None for the incomplete line of a killed process,
    or a line without an iteration."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    numbers = {key: value for key, value in record.items() if _is_number(value)}
    return numbers if isinstance(numbers.get("iteration"), int) else None


def _is_number(value: Any) -> bool:
    """Return True for a number that can be drawn; NaN and infinity are what diverged runs have."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return not abs(value) > LARGEST or value in (math.inf, -math.inf)
