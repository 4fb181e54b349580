"""Progress of long work: a bar in a terminal, plain lines with the time left elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from moco_common.text import duration

T = TypeVar("T")

STEPS = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}"  # below lines that hold the time left
_LOOP = "{desc} {percentage:3.0f}%|{bar}| eta {eta}{postfix}"


class Bar(tqdm):  # type: ignore[misc]
    """A tqdm bar that leaves nothing behind, with the field ``{eta}`` in `duration`'s format."""

    def __init__(self, **options: Any) -> None:
        super().__init__(leave=False, dynamic_ncols=True, **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's fields and ``eta``."""
        fields: dict[str, Any] = super().format_dict
        done, elapsed = fields["n"] - fields["initial"], fields["elapsed"]
        rate = fields["rate"] or (done / elapsed if elapsed else 0)
        left = ((fields["total"] or 0) - fields["n"]) / rate if rate else None
        return {**fields, "eta": "?" if left is None else duration(max(0, left))}


def step_bar(total: int, initial: int, file: TextIO, *, shown: bool) -> Bar:
    """Make a bar of a run's steps, to stay below the lines printed by ``tqdm.write``."""
    return Bar(total=total, initial=initial, file=file, disable=not shown, bar_format=STEPS)


class Loop:
    """Progress of a loop over ``total`` things: a bar in a terminal, a line now and then elsewhere.
    Used with ``with`` so that no bar is left behind.

    Args:
        what: beginning of each line.
        total: number of things; 0 if unknown.
        say: function that prints a line; a bar replaces ``print`` only.
        period: seconds between two lines; the text of a bar changes more often.
        file: stream for ``print`` and the bar.
    """

    def __init__(
        self,
        what: str,
        total: int,
        say: Callable[[str], None] = print,
        period: float = 3.0,
        file: TextIO | None = None,
    ) -> None:
        self.what, self.total, self.say, self.period = what, total, say, period
        self.file = file or sys.stdout
        self.done, self.rate = 0, 0.0  # steps per second
        self._began = self._said = time.monotonic()
        self._bar = Bar(
            desc=what,
            total=total or None,
            file=self.file,
            disable=say is not print or not self.file.isatty(),
            bar_format=_LOOP if total else None,
        )

    def at(self, done: int) -> bool:
        """Record the number done; return True if a line is due (see `tell`)."""
        now = time.monotonic()
        self.done, self.rate = done, done / max(now - self._began, 1e-9)
        self._bar.update(done - self._bar.n)
        if now - self._said < (self.period if self._bar.disable else 0.5):
            return False
        self._said = now
        return True

    def tell(self, text: str) -> None:
        """Print a line with this text and the time left, or show the text beside the bar."""
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
            return
        left = f"  eta {duration((self.total - self.done) / self.rate)}" if self.total else ""
        line = f"{self.what}: {text}{left}"
        if self.say is print:
            print(line, file=self.file, flush=True)
        else:
            self.say(line)

    def tick(self) -> None:
        """Record one more as done, and print the number if a line is due."""
        if self.at(self.done + 1):
            self.tell(f"{self.done}/{self.total}" if self.total else f"{self.done}")

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def follow(items: Iterable[T], total: int, what: str, quiet: bool = False) -> Iterator[T]:
    """Yield the items, and show their progress on standard error unless ``quiet``.

    Args:
        total: number of items; 0 if unknown.
    """
    say = silent if quiet else print
    with Loop(what, total, say, period=10.0, file=sys.stderr) as loop:
        for item in items:
            yield item
            loop.tick()


def silent(text: str) -> None:
    """Print nothing; replaces ``print``."""
