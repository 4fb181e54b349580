"""One try of a tool on a hostile input: in a forked process with limits, and with a verdict.

The process that calls `Arena.start` has imported torch, Detectron2 and all tools once; each try is
a fork of it, so that thousands of them are affordable. A fork gets an address space that is only
`MEMORY` larger than the one it starts with, `CPU_SECONDS` of computing and `WALL_SECONDS` of time.

Execution is noticed in two ways: payloads create a file (the proof), and an audit hook records
every process, connection or dangerous function that Python itself reports.
"""

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY = 3 << 29  # bytes beyond what the parent uses
CPU_SECONDS = 40
WALL_SECONDS = 240  # generous: the machine may be busy
PROOF = "executed"  # name of the file that payloads create in the sandbox of their try

REFUSED, ACCEPTED = "refused", "accepted harmlessly"
EXECUTED, HUNG, TRACEBACK = "executed", "hung", "traceback"
EXHAUSTED, UNCLEAR, WROTE = "memory exhausted", "refused without a sentence", "wrote elsewhere"
FINE = (REFUSED, ACCEPTED)
FAULTS = (EXECUTED, HUNG, TRACEBACK, EXHAUSTED, UNCLEAR, WROTE)

_RUNNING = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
_RUNNING += ("subprocess.Popen", "webbrowser.open", "urllib.Request", "socket.connect")
_RUNNING += ("socket.getaddrinfo", "ftplib.connect", "smtplib.connect", "ctypes.dlopen")
_CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink")
_CHANGING += ("os.chmod", "os.chown", "os.truncate", "shutil.rmtree", "shutil.move")
_TRUSTED_NAMES = ("/sys/", "/proc/", "/dev/null", "/dev/tty", "/dev/shm")


@dataclass(frozen=True)
class Try:
    """A call of ``function`` with ``argv`` in ``sandbox``, where alone it may write, after
    ``prepare`` has put the inputs there."""

    name: str
    function: Callable[[list[str]], Any]
    argv: Sequence[str]
    sandbox: Path
    prepare: Callable[[Path], object] | None = None


@dataclass(frozen=True)
class Outcome:
    name: str
    verdict: str
    text: str
    seconds: float


class Arena:
    """Runs up to ``processes`` tries at a time, and yields their outcomes as they end."""

    def __init__(self, processes: int = 1, wall_seconds: float = WALL_SECONDS) -> None:
        self.processes, self.wall_seconds = processes, wall_seconds
        self._running: dict[int, tuple[Try, float]] = {}

    def start(self, attempt: Try) -> list[Outcome]:
        """Start a try once there is room; the outcomes of those that ended meanwhile."""
        ended = []
        while len(self._running) >= self.processes:
            ended += self._ended()
        pid = os.fork()
        if pid == 0:
            _in_child(attempt)
        self._running[pid] = attempt, time.monotonic()
        return ended

    def finish(self) -> list[Outcome]:
        """Wait for all that are left."""
        ended = []
        while self._running:
            ended += self._ended()
        return ended

    def run(self, attempt: Try) -> Outcome:
        """One try from start to end."""
        self.start(attempt)
        (outcome,) = self.finish()
        return outcome

    def _ended(self) -> list[Outcome]:
        outcomes = []
        for pid, (attempt, began) in list(self._running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.monotonic() - began
            code: int | None = None
            if done:
                code = os.waitstatus_to_exitcode(status)
            elif seconds < self.wall_seconds:
                continue
            _end_group(pid)
            if not done:
                os.waitpid(pid, 0)
            del self._running[pid]
            outcomes.append(_judge(attempt, code, seconds))
        if not outcomes:
            time.sleep(0.002)
        return outcomes


def output_of(sandbox: Path) -> Path:
    """The file that gets what a try prints; beside the sandbox."""
    return sandbox.with_name(f"{sandbox.name}.txt")


def _end_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _judge(attempt: Try, code: int | None, seconds: float) -> Outcome:
    text = output_of(attempt.sandbox).read_text(errors="replace")
    events = attempt.sandbox.with_name(f"{attempt.sandbox.name}.events")
    seen = events.read_text().splitlines() if events.exists() else []
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if (attempt.sandbox / PROOF).exists() or any(line.startswith("ran ") for line in seen):
        verdict = EXECUTED
    elif seen:
        verdict = WROTE
    elif code is None or code == -signal.SIGXCPU:
        verdict = HUNG
    elif "memory than is free" in text or "MemoryError" in text or "bad_alloc" in text:
        verdict = EXHAUSTED
    elif code < 0 or code == 99 or "Traceback (most recent call last)" in text:
        verdict = TRACEBACK
    elif code == 0:
        verdict = ACCEPTED
    elif code == 2 or len(lines) == 1:
        verdict = REFUSED
    else:
        verdict = UNCLEAR
    return Outcome(attempt.name, verdict, "\n".join([*seen, f"exit {code}", text]), seconds)


def _in_child(attempt: Try) -> None:
    """Do the try and end this process; never return."""
    code = 99
    try:
        os.setsid()
        attempt.sandbox.mkdir(exist_ok=True)
        handle = os.open(output_of(attempt.sandbox), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, stream in ((nothing, 0), (handle, 1), (handle, 2)):
            os.dup2(number, stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(attempt.sandbox)
        for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
            os.environ[name] = str(attempt.sandbox.resolve())
        tempfile.tempdir = None
        if attempt.prepare is not None:
            attempt.prepare(attempt.sandbox)
        _limit()
        sys.addaudithook(_Watch(attempt.sandbox))
        code = attempt.function(list(attempt.argv)) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, used + MEMORY),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 1 << 30),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most + 5 if kind == resource.RLIMIT_CPU else most))


class _Watch:
    """An audit hook that records what no input may cause."""

    def __init__(self, sandbox: Path) -> None:
        self.inside = str(sandbox.resolve())
        self.handle = os.open(
            sandbox.with_name(f"{sandbox.name}.events"), os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )
        self.busy, self.owner = False, os.getpid()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            if event in _RUNNING and not _is_local(event, arguments):
                self._record(f"ran {event} {arguments!r:.200}")
            elif event == "open" and _writes(arguments) and not self._may_write(arguments[0]):
                self._record(f"opened for writing {arguments[0]!r:.200}")
            elif event in _CHANGING and not all(
                self._may_write(path) for path in arguments if isinstance(path, (str, bytes, Path))
            ):
                self._record(f"changed {event} {arguments!r:.200}")
        finally:
            self.busy = False

    def _may_write(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        path = os.path.abspath(os.fsdecode(path))
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        return real.startswith((self.inside, *_TRUSTED_NAMES)) or "__pycache__" in real

    def _record(self, line: str) -> None:
        os.write(self.handle, (line.replace("\n", " ") + "\n").encode(errors="replace"))


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wxa+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def _is_local(event: str, arguments: tuple[Any, ...]) -> bool:
    """True for what the tools' own libraries do: a library of this system, a local socket."""
    if event == "subprocess.Popen":  # of results.json, for the commit of the checkout
        words = list(arguments[1])  # of results.json; of the user's own `shards:pipe:cat x.tar`
        return words == ["git", "rev-parse", "HEAD"] or words[1:] == ["-c", "cat x.tar"]
    if event == "ctypes.dlopen":
        path = os.path.abspath(os.fsdecode(arguments[0] or ""))
        return path.startswith(sys.prefix) or not os.path.isfile(path)
    if event == "socket.connect":
        return not isinstance(arguments[1], tuple)
    return False
