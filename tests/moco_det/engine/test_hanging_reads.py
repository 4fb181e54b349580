"""A run that hangs in a read, as on a file server that is gone, obeys a signal within seconds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import NARROW, QUICK

ROOT = Path(__file__).parents[3]
# A script, so that spawned ranks and loader processes have the same hanging read.
HANGING = """
import os, sys
sys.path[0] = {root!r}
import torch.distributed as dist
from moco_common import stopping
from moco_det.data import dataset_mapper

stopping.WAITING_GRACE, stopping.WORKERS_GRACE = 2, 2
check = dataset_mapper.check_picture
reads = []

def hangs(path):
    reads.append(path)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == {rank} and len(reads) > {after}:
        open({proof!r}, "w").close()
        os.read(os.pipe()[0], 1)
    check(path)

dataset_mapper.check_picture = hangs
if __name__ == "__main__":
    from tools.train_net import main
    sys.exit(main(sys.argv[1:]))
"""


def start(tmp_path, voc_dir, *, rank=0, after=2, processes=1, workers=0, precise=False):
    proof, script = tmp_path / "hanging", tmp_path / "run.py"
    script.write_text(HANGING.format(root=str(ROOT), rank=rank, after=after, proof=str(proof)))
    words = ["--config", "VOC-random", "--train-data", f"voc:{voc_dir}:trainval", *NARROW, *QUICK]
    words += ["--output-dir", str(tmp_path / "run"), "--num-gpus", str(processes)]
    words += ["SOLVER.MAX_ITER", "9", "DATALOADER.NUM_WORKERS", str(workers)]
    words += ["SOLVER.IMS_PER_BATCH", "2", "TEST.PRECISE_BN.ENABLED", str(precise)]
    words += ["TEST.EVAL_PERIOD", "1"] if precise else []
    process = subprocess.Popen(
        [sys.executable, script, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    end = time.monotonic() + 200
    metrics = tmp_path / "run" / "metrics.json"
    while not proof.exists() or (workers and not (metrics.exists() and metrics.read_text())):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(2 if workers else 0)  # the batch that was read ahead is used up
    return process


def ended(process, number):
    process.send_signal(number)
    began = time.monotonic()
    try:
        text, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number, text
    assert time.monotonic() - began < 60
    assert "Traceback" not in text, text
    return text


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fine_tuning_that_hangs_in_a_read_obeys_a_signal(tmp_path, voc_dir, workers, number):
    text = ended(start(tmp_path, voc_dir, workers=workers), number)
    assert f"stopped by {number.name} while waiting for data" in text
    assert "saved: continue with --resume" not in text  # nothing more was saved


def test_fine_tuning_that_hangs_in_precise_bn_obeys_a_signal(tmp_path, voc_dir):
    text = ended(start(tmp_path, voc_dir, after=2, precise=True), signal.SIGTERM)
    assert "stopped by SIGTERM while waiting for data" in text


def test_two_ranks_of_which_one_hangs_obey_a_signal(tmp_path, voc_dir):
    text = ended(start(tmp_path, voc_dir, processes=2, rank=1, after=1), signal.SIGTERM)
    assert "stopped" in text
