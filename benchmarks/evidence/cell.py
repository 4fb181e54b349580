"""One cell of the evidence, in a separate process: pre-train, probe, write the result.

python benchmarks/evidence/cell.py FOLDER     # reads FOLDER/spec.json, writes FOLDER/result.json
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import cv2
import torch
from fvcore.common.config import CfgNode

from moco_common.files import replace_text
from pretrain.checkpoint.format import LAST
from pretrain.config.defaults import load_config
from pretrain.engine.train_loop import train
from pretrain.probe.backbone import random_backbone
from pretrain.probe.run import Settings, probe

RECIPE = Path(__file__).with_name("evidence.yaml")
RESULT, SPEC = "result.json", "spec.json"


def config(overrides: dict[str, Any], seed: int) -> CfgNode:
    """Return the config of a cell; its overrides are checked like those of a command line."""
    pairs = [str(word) for pair in overrides.items() for word in pair]
    return load_config(str(RECIPE), [*pairs, "SEED", str(seed)])


def run(folder: Path) -> dict[str, Any]:
    """Run the cell described by ``folder``/spec.json."""
    spec = json.loads((folder / SPEC).read_text())
    cfg = config(spec["overrides"], spec["seed"])
    began = time.monotonic()
    result: dict[str, Any] = {}
    before = peak_memory()
    checkpoint = folder / "run" / LAST
    if spec["trained"]:
        cfg.DATA, cfg.OUTPUT_DIR = [spec["pool"]], str(folder / "run")
        train(cfg, resume=True)
        result |= _last_fifth(folder / "run" / "metrics.json")
        result["rss"] = peak_memory() - before
    else:
        checkpoint.parent.mkdir(exist_ok=True)
        model = cfg.MODEL
        weights = random_backbone(spec["seed"], depth=model.DEPTH, width=model.WIDTH)
        torch.save(weights.state_dict(), checkpoint)
    result["training_seconds"] = time.monotonic() - began
    if spec["train"]:
        result |= _probe(checkpoint, spec)
    result["seconds"] = time.monotonic() - began
    return result


def _probe(checkpoint: Path, spec: dict[str, Any]) -> dict[str, Any]:
    measured = probe(
        Settings(
            str(checkpoint),
            spec["train"],
            spec["test"],
            holdout=spec["holdout"],
            crop_size=spec["probe_size"],
            resize=spec["probe_size"],
            fit_bn=not spec["trained"],
            quick=True,
        )
    )
    return {
        "knn": measured["knn"]["top1"],
        "linear": measured["quick_linear"]["top1"],
        "images": [measured["train"]["images"], measured["test"]["images"]],
        "classes": len(measured["classes"]),
    }


def _last_fifth(path: Path) -> dict[str, float]:
    """Return the means of the scalars over the last fifth of a run; shares are in percent."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    last = records[-1]["iteration"]
    tail = [record for record in records if record["iteration"] > 0.8 * last]
    names = {"loss": 1.0, "accuracy": 100.0, "spread": 1.0}
    return {
        name: factor * sum(record[name] for record in tail) / len(tail)
        for name, factor in names.items()
        if name in tail[0]
    }


def peak_memory() -> float:
    """Return the peak resident set size of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def run_as_a_process(run: Callable[[Path], dict[str, Any]]) -> None:
    """Run the cell in the folder given on the command line, on one thread; write its result."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    folder = Path(sys.argv[1])
    replace_text(folder / RESULT, json.dumps(run(folder), indent=1) + "\n")


if __name__ == "__main__":
    run_as_a_process(run)
