"""Progress of long work: a bar in a terminal, plain lines with the time left elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from moco_common.text import duration

T = TypeVar("T")


def follow(items: Iterable[T], total: int, what: str, quiet: bool = False) -> Iterator[T]:
    """The items, with a bar in a terminal, elsewhere a plain line now and then, on standard error.

    Args:
        total: how many there are; 0 where that is not known.
        quiet: neither.
    """
    if quiet:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(
            items, total=total or None, desc=what, unit="image", leave=False, dynamic_ncols=True
        )
    else:
        ticker = Ticker(what, total, say=lambda line: print(line, file=sys.stderr, flush=True))
        for item in items:
            yield item
            ticker.tick()


class Ticker:
    """Says now and then how far a loop over ``total`` things is; nothing where it is short."""

    def __init__(
        self, what: str, total: int, period: float = 10.0, say: Callable[[str], None] = print
    ) -> None:
        self._what, self._total, self._period, self._say = what, total, period, say
        self._done = 0
        self._start = self._last = time.perf_counter()

    def tick(self) -> None:
        """One more is done; says so if the last word is some time ago."""
        self._done += 1
        now = time.perf_counter()
        if now - self._last >= self._period:
            self._last = now
            line = f"{self._what} {self._done}"
            if self._total:
                left = (now - self._start) / self._done * max(0, self._total - self._done)
                line += f"/{self._total}  eta {duration(left)}"
            self._say(line)


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
