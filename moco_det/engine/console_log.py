"""Logging of a run: plain lines on the console, everything in ``log.txt``."""

import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter, get_event_storage
from tqdm import tqdm

from moco_common.files import is_full_disk
from moco_common.progress import step_bar
from moco_common.text import duration

LOGGED = ("moco_det", "detectron2", "fvcore")
log = logging.getLogger("moco_det")


def silence_detectron2() -> None:
    """Silence warnings about Detectron2's use of deprecated torch functions."""
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    warnings.filterwarnings("ignore", message=".*(torch.cuda.amp|broadcast_buffers)")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


@contextmanager
def logging_to(directory: Path, rank: int, quiet: bool = False) -> Iterator[None]:
    """Log this project's messages to the console (rank 0 only), and all messages to ``log.txt``.

    Detectron2's messages (the model, class histograms) go only to the file. The handlers are
    removed on exit, so that consecutive runs in one process have separate logs.

    Args:
        directory: the run directory; created if missing.
        rank: rank of this process; ranks above 0 write ``log.txt.rankN``.
        quiet: print only warnings on the console.
    """
    silence_detectron2()
    directory.mkdir(parents=True, exist_ok=True)
    name = "log.txt" if rank == 0 else f"log.txt.rank{rank}"
    file = _LogFile(directory / name, encoding="utf-8")
    file.setFormatter(
        logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S")
    )
    console = _Console(logging.WARNING if quiet else logging.INFO)
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
    """Redirect standard output to ``log.txt``, line by line, for libraries that print."""
    with redirect_stdout(_LogStream()):
        yield


class _LogFile(logging.FileHandler):
    """A log file that drops lines while the disk is full.

    The checkpoint or record that cannot be written then ends the run with a clear error, which a
    logging failure would hide.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not is_full_disk(sys.exc_info()[1]):
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            if not is_full_disk(error):
                raise


class _Console(logging.Handler):
    """Lines on standard output, above the progress bar if any; warnings on standard error."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._out = sys.stdout  # `printing_to_log` replaces it later

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else self._out
        try:
            with tqdm.external_write_mode(file=self._out):
                print(self.format(record), file=stream, flush=True)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # The terminal was closed. SIGHUP stops the run, which still has to save.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class TerminalBar(HookBase):
    """A progress bar below the log lines, in a terminal only."""

    def before_train(self) -> None:
        shown = sys.stdout.isatty() and _console_level() <= logging.INFO
        self._bar = step_bar(self.trainer.max_iter, self.trainer.iter, sys.stdout, shown=shown)

    def after_step(self) -> None:
        self._bar.update()

    def after_train(self) -> None:
        self._bar.close()


def _console_level() -> int:
    return min((h.level for h in log.handlers if isinstance(h, _Console)), default=logging.ERROR)


class _LogStream(io.TextIOBase):
    def write(self, text: str) -> int:
        for line in filter(str.strip, text.splitlines()):
            logging.getLogger("detectron2.evaluation").info(line)
        return len(text)


class ProgressPrinter(EventWriter):
    """A progress line: iteration, ETA, losses, learning rate, iterations per second.

    Args:
        max_iter: length of the schedule, in iterations.
        window: number of iterations over which the median of a loss is taken.
    """

    def __init__(self, max_iter: int, window: int = 20) -> None:
        self._max_iter = max_iter
        self._window = window

    def write(self) -> None:
        storage = get_event_storage()
        done = storage.iter + 1
        # Also called after training, which may have failed in the middle of an iteration.
        if done > self._max_iter or storage.latest().get("lr", (0, -1))[1] != storage.iter:
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
