"""Command lines run in parallel processes, skipping those that have already finished."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from moco_common.errors import UserError
from moco_common.text import duration

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """Commands to run in sequence, with a log in ``folder``; finished once ``done`` exists."""

    name: str
    folder: Path
    commands: Sequence[Sequence[str]]
    done: Path

    def run(self) -> float:
        """Run the commands on one thread each, with their output in log.txt.

        Returns:
            The seconds taken.

        Raises:
            UserError: a command failed; the message has its last lines.
        """
        began = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        log = self.folder / "log.txt"
        for command in self.commands:
            with log.open("a") as file:
                status = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
                ).returncode
            if status or (command is self.commands[-1] and not self.done.exists()):
                tail = " | ".join(log.read_text(errors="replace").splitlines()[-3:])
                raise UserError(f"{self.name} ended with status {status} ({log}): {tail}")
        return time.monotonic() - began


def run_jobs(jobs: Sequence[Job], parallel: int, what: str) -> list[str]:
    """Run the unfinished jobs, ``parallel`` at a time; return the failures, one sentence each."""
    todo = [job for job in jobs if not job.done.exists()]
    print(f"{what}: {len(jobs)} in total, {len(jobs) - len(todo)} already done", flush=True)
    failures: list[str] = []
    began = time.monotonic()
    with ThreadPoolExecutor(parallel) as pool:
        running: dict[Future[float], Job] = {pool.submit(job.run): job for job in todo}
        finished = 0
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, finished = running.pop(future), finished + 1
                    left = (time.monotonic() - began) / finished * (len(todo) - finished)
                    try:
                        end = f"{duration(future.result())}"
                    except UserError as error:
                        failures.append(str(error))
                        end = f"FAILED: {error}"
                    print(
                        f"  {finished}/{len(todo)}  {job.name}  {end}  eta {duration(left)}",
                        flush=True,
                    )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # the children get the same signal
            raise
    return failures
