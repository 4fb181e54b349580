"""What a run says while it goes: progress lines, metrics.json, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TextIO

METRICS = "metrics.json"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Records scalars of a run that has ``total`` steps and may start at ``start``.

    Lines of metrics.json from beyond ``start`` (steps that a killed run did after its last
    checkpoint) are dropped, so a resumed run leaves the record of one run.
    """

    def __init__(
        self, folder: Path, *, start: int, total: int, batch_size: int, stream: TextIO | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, needed only here

        self.total, self.batch_size = total, batch_size
        self.stream = stream or sys.stdout
        self.path = folder / METRICS
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                record = _record(line)
                if record is not None and record["iteration"] <= start:
                    kept.append(line + "\n")
        self.path.write_text("".join(kept))
        self.writer = SummaryWriter(str(folder), purge_step=start)
        self.began = self.last_time = time.monotonic()
        self.began_step = self.last_step = start

    def log(self, step: int, text: str, **scalars: float) -> None:
        """Print one line for ``step`` steps done and record ``scalars`` with it."""
        now = time.monotonic()
        rate = (step - self.last_step) * self.batch_size / max(now - self.last_time, 1e-9)
        pace = (now - self.began) / max(1, step - self.began_step)
        self.last_time, self.last_step = now, step
        scalars["images_per_second"] = rate
        eta = clock(pace * (self.total - step))
        width = len(str(self.total))
        self.say(f"iter {step:>{width}}/{self.total}  {text}  {rate:.0f} images/s  eta {eta}")
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        self.writer.close()


def _record(line: str) -> dict | None:
    """A line of metrics.json; None for the half line of a killed process."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "iteration" in record else None
