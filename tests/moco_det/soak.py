"""Kill a fine-tuning run again and again, and compare its end with that of a run left alone.

    python -m tests.moco_det.soak [--kills 4] [--processes 2] [--iterations 40] [--seed 0]

Every kill comes at a random moment, as SIGKILL to all processes (a machine that goes down) or as
SIGTERM (a scheduler); after some of them the newest of several checkpoints is cut off (a crash of
the machine). Each time the run is resumed with --resume. In the end both final checkpoints must be
the same, bit for bit. Not a test that runs by itself: `make soak`.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from moco_common.errors import UserError
from moco_det.checkpoint.detector_weights import read_detector
from moco_det.checkpoint.run_checkpointer import newest_checkpoints
from tests.conftest import NARROW, QUICK
from tests.moco_det.engine.test_resume import assert_same

ROOT = Path(__file__).parents[2]


def command(data: Path, output_dir: Path, processes: int, iterations: int) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "tools" / "train_net.py"), "--config", "scenes-random"),
        *("--train-data", f"voc:{data}:train", "--output-dir", str(output_dir)),
        *("--num-gpus", str(processes), *NARROW, *QUICK, "DATALOADER.NUM_WORKERS", "2"),
        *("SOLVER.IMS_PER_BATCH", str(2 * processes), "SOLVER.BASE_LR", "0.005"),
        *("SOLVER.MAX_ITER", str(iterations), "SOLVER.CHECKPOINT_PERIOD", "7"),
        *("TEST.EVAL_PERIOD", "10", "SOLVER.WARMUP_ITERS", "5"),
    ]


def progress(output_dir: Path) -> int:
    metrics = output_dir / "metrics.json"
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        # A session of its own, so that all its processes can be killed at once.
        return subprocess.Popen(
            arguments, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def kill(run: subprocess.Popen, how: int) -> int:
    """Kill a run; its exit code."""
    if how == signal.SIGTERM:
        run.terminate()
    else:
        os.killpg(run.pid, how)
    return run.wait(timeout=300)


def cut_off_newest(output_dir: Path) -> str | None:
    """Cut off the newest checkpoint, if the run has another to resume from; return its name."""
    newest, *older = newest_checkpoints(output_dir)
    if not any(map(is_intact, older)):
        return None
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    return newest.name


def is_intact(checkpoint: Path) -> bool:
    try:
        read_detector(checkpoint)
    except UserError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        return soak(Path(name), args, rng)


def soak(folder: Path, args: argparse.Namespace, rng: random.Random) -> int:
    from moco_det.demo.scene_dataset import write_scenes

    list(write_scenes(folder / "scenes", unlabelled=0, train=12, test=1, size=96, processes=1))
    data, log = folder / "scenes" / "voc", folder / "log"
    whole, killed = folder / "whole", folder / "killed"
    sizes = (args.processes, args.iterations)
    begin = time.monotonic()
    if start(command(data, whole, *sizes), log).wait() != 0:
        print(log.read_text())
        return 1
    seconds = time.monotonic() - begin
    print(f"left alone: {args.iterations} iterations in {seconds:.0f} s", flush=True)
    for count in range(args.kills):
        before = progress(killed)
        run = start([*command(data, killed, *sizes), "--resume"], log)
        # Most kills come while it trains, some while it starts.
        left = (args.iterations - before) // (args.kills - count + 1)
        target = before + rng.randint(1, max(1, left)) if rng.random() < 0.8 else 0
        while target and run.poll() is None and progress(killed) < target:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3 if target else seconds / 3))
        if run.poll() is not None:
            print(f"kill {count + 1}: it had ended with exit code {run.returncode}", flush=True)
            break
        how = rng.choice((signal.SIGKILL, signal.SIGTERM))
        code = kill(run, how)
        said = f"kill {count + 1}: {how.name} at line {progress(killed)} ({before} before), {code}"
        if (killed / "last_checkpoint").is_file() and rng.random() < 0.4:
            said += f"; {cut_off_newest(killed) or 'no checkpoint'} cut off"
        print(said, flush=True)
    if start([*command(data, killed, *sizes), "--resume"], log).wait() != 0:
        print(log.read_text())
        return 1
    final = [torch.load(run / "model_final.pth", weights_only=True) for run in (whole, killed)]
    assert_same(*final)
    print(f"the same final checkpoint after {args.kills} kills: {len(final[0]['model'])} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
