"""What a person sees of a run: one plain line at a time; everything else goes into ``log.txt``."""

import datetime
import io
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from detectron2.utils.events import EventWriter, get_event_storage

LOGGED = ("moco_det", "detectron2", "fvcore")
log = logging.getLogger("moco_det")


def silence_detectron2() -> None:
    """Drop warnings of Detectron2's calls of torch functions that have changed since.

    There is nothing that a user could mend.
    """
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    warnings.filterwarnings("ignore", message=".*(torch.cuda.amp|broadcast_buffers)")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


@contextmanager
def logging_to(directory: Path, rank: int) -> Iterator[None]:
    """Log this project's messages to the console (rank 0) and everyone's to ``log.txt``.

    Detectron2's own messages (the model, the optimizer's hooks, class histograms) go to the file
    only. The handlers are removed at the end, so that runs in one process keep their logs apart.
    """
    silence_detectron2()
    directory.mkdir(parents=True, exist_ok=True)
    name = "log.txt" if rank == 0 else f"log.txt.rank{rank}"
    file = logging.FileHandler(directory / name, encoding="utf-8")
    file.setFormatter(
        logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S")
    )
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    added: list[tuple[logging.Logger, logging.Handler]] = [
        (logging.getLogger(name), file) for name in LOGGED
    ]
    if rank == 0:
        added.append((log, console))
    before = {name: logging.getLogger(name).propagate for name in LOGGED}
    for logger, handler in added:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, handler in added:
            logger.removeHandler(handler)
        for name, propagate in before.items():
            logging.getLogger(name).propagate = propagate
        file.close()


@contextmanager
def printing_to_log() -> Iterator[None]:
    """What a library prints goes line by line into ``log.txt`` instead of the console."""
    with redirect_stdout(_LogStream()):
        yield


class _LogStream(io.TextIOBase):
    def write(self, text: str) -> int:
        for line in filter(str.strip, text.splitlines()):
            logging.getLogger("detectron2.evaluation").info(line)
        return len(text)


def duration(seconds: float) -> str:
    """``"0:03:10"``."""
    return str(datetime.timedelta(seconds=round(seconds)))


class ProgressPrinter(EventWriter):
    """A line of progress: iteration, time left, losses, learning rate, iterations per second."""

    def __init__(self, max_iter: int, window: int = 20) -> None:
        self._max_iter = max_iter
        self._window = window

    def write(self) -> None:
        storage = get_event_storage()
        done = storage.iter + 1
        if done > self._max_iter:  # called once more after training
            return

        def smoothed(key: str) -> float:
            return float(storage.history(key).median(storage.count_samples(key, self._window)))

        histories = storage.histories()
        losses = [k for k in histories if k.startswith("loss_")]
        parts = " ".join(f"{k[5:]} {smoothed(k):.3f}" for k in losses)
        total = smoothed("total_loss") if "total_loss" in histories else float("nan")
        line = f"iter {done:>{len(str(self._max_iter))}}/{self._max_iter}"
        if "time" in histories:  # measured from the third iteration on
            seconds = storage.history("time").avg(min(1000, storage.count_samples("time", 1000)))
            line += f"  eta {duration(seconds * (self._max_iter - done))}"
        line += f"  loss {total:.3f} ({parts})  lr {storage.history('lr').latest():.4g}"
        if "time" in histories:
            line += f"  {1 / max(seconds, 1e-9):.2f} it/s"
        log.info(line)


class Ticker:
    """Says now and then how far a loop over ``total`` things is; nothing where it is short."""

    def __init__(self, what: str, total: int, period: float = 10.0) -> None:
        self._what, self._total, self._period = what, total, period
        self._done = 0
        self._start = self._last = time.perf_counter()

    def tick(self) -> None:
        """One more is done; says so if the last word is some time ago."""
        self._done += 1
        now = time.perf_counter()
        if now - self._last >= self._period:
            self._last = now
            left = (now - self._start) / self._done * (self._total - self._done)
            log.info("%s %d/%d  eta %s", self._what, self._done, self._total, duration(left))
