"""Ownership of a run directory: one run at a time, and runs of one kind only."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from moco_common.errors import UserError
from moco_common.files import full_disk_explained, parse_json, read_text

NAME = "run.lock"
PRETRAINING, FINE_TUNING, UNKNOWN = "pre-training", "fine-tuning", "unknown"
_CONFIG = "config.yaml"
_MOST = 4096  # characters of a lock file that are read
# Files that only one kind of run writes, for a directory without a configuration.
_TRACES = {
    PRETRAINING: ("checkpoint_last.pth", "skipped_images.txt"),
    FINE_TUNING: ("results.json", "model_final.pth", "last_checkpoint"),
    UNKNOWN: ("metrics.json",),
}


class RunLock:
    """A lock held within ``with`` by the process that writes to the directory.

    The kernel releases it when the process ends in any way, so a killed run leaves nothing to clean
    up. Most network file systems pass such locks on to other hosts. For those that do not, the
    holder also touches the file every ``beat`` seconds, and a process that finds another host's
    name in it watches for three beats whether the file is touched.

    Args:
        folder: directory of the run, created if missing.
        held: False for the ranks that do not write, which need no lock.
        beat: seconds between two touches.

    Raises:
        UserError: on entering, another run is using the directory, or it is not writable; on
            leaving by an error about a missing file, the directory was removed.
    """

    def __init__(self, folder: Path, *, held: bool = True, beat: float = 5.0) -> None:
        self.path, self.held, self.beat = folder / NAME, held, beat
        self._file: Any = None
        self._done = threading.Event()

    def __enter__(self) -> RunLock:
        if not self.held:
            return self
        # Nothing else in this process may open the file: closing any handle of it would release the
        # lock. flock() is no alternative: forked data-loader workers keep such a lock after this
        # process has died.
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(
                f"--output-dir {self.path.parent} cannot be written ({error.strerror}): choose "
                f"another one."
            ) from None
        certain = True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._refuse()
        except OSError:
            certain = False  # a file system without locks: rely on the beat
        holder = self._holder()
        if holder and not (certain and holder["host"] == socket.gethostname()) and self._beats():
            self._refuse()
        with full_disk_explained(self.path):
            self._file.truncate(0)
            holder = {"host": socket.gethostname(), "pid": os.getpid()}
            os.write(self._file.fileno(), json.dumps(holder).encode() + b"\n")
        threading.Thread(target=self._touch, name="lock", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if not self.held:
            return
        self._done.set()
        self._file.truncate(0)  # an empty file has no holder
        self._file.close()
        if isinstance(error, FileNotFoundError) and not self.path.exists():
            raise UserError(
                f"{self.path.parent} was removed while the run was writing to it: restore it and "
                f"pass --resume, or start again."
            ) from None

    def _holder(self) -> dict[str, Any] | None:
        self._file.seek(0)
        try:
            holder = parse_json(self._file.read(_MOST))
        except ValueError:
            return None
        return holder if isinstance(holder, dict) and {"host", "pid"} <= set(holder) else None

    def _refuse(self) -> None:
        holder = self._holder()
        self._file.close()
        who = f" (process {holder['pid']} on {holder['host']})" if holder else ""
        raise UserError(
            f"Another run is using {self.path.parent}{who}: wait for it, stop it, or choose "
            f"another --output-dir."
        )

    def _beats(self) -> bool:
        """Return True if another process touches the file. Only the file's own times are compared,
        because the clocks of hosts differ."""
        before = os.fstat(self._file.fileno()).st_mtime_ns
        end = time.monotonic() + 3 * self.beat
        while time.monotonic() < end:
            time.sleep(self.beat / 5)
            if os.stat(self.path).st_mtime_ns != before:
                return True
        return False

    def _touch(self) -> None:
        while not self._done.wait(self.beat):
            try:
                os.utime(self.path)
            except OSError:
                return  # the folder was removed or became unreachable: the run will notice


def is_in_use(folder: Path, beat: float = 5.0) -> bool:
    """Return True if a run holds the lock of a directory and has touched it in the last few beats.

    The lock is only looked at, so that a run may start at the same moment.
    """
    try:
        status = (folder / NAME).stat()
    except OSError:
        return False
    return status.st_size > 0 and time.time() - status.st_mtime < 6 * beat


def kind_of_run(folder: Path) -> str | None:
    """Return the kind of run whose files a directory contains: `PRETRAINING`, `FINE_TUNING`,
    `UNKNOWN` for those of another program, or None for no run."""
    config = folder / _CONFIG
    if config.is_file():
        text = read_text(config)
        # The top-level keys are enough, so a hostile file costs no more than its lines.
        keys = {line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()}
        if "METHOD" in keys:
            return PRETRAINING
        return FINE_TUNING if {"MODEL", "DATASETS"} <= keys else UNKNOWN
    for kind, names in _TRACES.items():
        if any((folder / name).exists() for name in names):
            return kind
    return None


def check_kind_of_run(folder: Path, kind: str) -> None:
    """Refuse a directory with the files of another kind of run than ``kind``.

    Raises:
        UserError: these would be overwritten or mixed with the new run's.
    """
    found = kind_of_run(folder)
    if found not in (None, kind):
        whose = f"a {found} run" if found != UNKNOWN else f"a {_CONFIG} or metrics.json of its own"
        raise UserError(
            f"{folder} contains {whose}, which a {kind} run would overwrite: choose another "
            f"--output-dir."
        )
