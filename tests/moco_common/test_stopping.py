import signal
import subprocess
import sys
import time

import pytest

HANG = """
import os, sys
import numpy as np
from moco_common import stopping
from moco_common.errors import run_tool
from pretrain.data.loader import build_batches
from pretrain.data.source_base import Source
from pretrain.data.transforms.recipes import view_recipes

stopping.WAITING_GRACE = 2
hang, proof = os.pipe()

class Hanging(Source):
    def __len__(self):
        return 8

    def name(self, index):
        return "x"

    def read(self, index):
        print("reading", flush=True)
        return os.read(hang, 1)

def work():
    recipes = view_recipes("moco-v1", crop_size=8)
    batches = build_batches(
        Hanging(), recipes, batch_size=4, seed=0, stop_step=3, num_workers=int(sys.argv[1])
    )
    with stopping.StopRequest() as request:
        for batch in request.waiting(batches):
            pass

sys.exit(run_tool(work))
"""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_hangs_in_a_read_obeys_a_signal(workers, number):
    command = [sys.executable, "-c", HANG, str(workers)]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout.readline() == "reading\n"
        time.sleep(0.5)
        process.send_signal(number)
        began = time.monotonic()
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert time.monotonic() - began < 30
    assert f"stopped by {number.name} while waiting for data" in errors
    assert "Traceback" not in errors
