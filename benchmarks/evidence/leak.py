"""One cell of the evidence: MoCo with keys of other images, which only BN statistics can match.

python benchmarks/evidence/leak.py FOLDER     # reads FOLDER/spec.json, writes FOLDER/result.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import cv2
import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from benchmarks.evidence.cell import SPEC, config, run_as_a_process
from pretrain.engine.train_step import TrainStep
from pretrain.methods import build_method
from pretrain.methods.components import unit
from pretrain.methods.moco import MoCo
from pretrain.solver.optimizers import build_optimizer
from pretrain.solver.schedules import learning_rate

MEASURED_EVERY = 5  # steps


def partners(images: Tensor, groups: int) -> Tensor:
    """Replace each image by the previous one in its group, cyclically: (N, ...) -> (N, ...)."""
    return images.unflatten(0, (groups, -1)).roll(1, 1).flatten(0, 1)


def from_company(q: Tensor, k: Tensor, groups: int) -> float:
    """Return the share of queries whose nearest key, except their own image's, is of their group.

    Args:
        q, k: (N, C), unit vectors; key i is computed from the partner of image i.
    """
    rows = torch.arange(len(q))
    similarity = q @ k.T  # NxN
    similarity[partners(rows, groups), rows] = -2.0
    group = rows * groups // len(q)
    return (group[similarity.argmax(1)] == group).float().mean().item()


def run(folder: Path) -> dict[str, Any]:
    """Run the cell described by ``folder``/spec.json."""
    spec = json.loads((folder / SPEC).read_text())
    cfg = config(spec["overrides"], spec["seed"])
    torch.manual_seed(cfg.SEED)
    images = read_images(Path(spec["pool"]).read_text().splitlines(), cfg.INPUT.CROP_SIZE)
    method = build_method(cfg, num_images=len(images), total_steps=cfg.SOLVER.MAX_ITER)
    assert isinstance(method, MoCo)
    return cheat(method.train(), images, cfg)


def cheat(method: MoCo, images: Tensor, cfg: CfgNode) -> dict[str, Any]:
    """Train on the task; return the means over the last tenth of the run, and a curve of tenths."""
    groups, solver, steps = cfg.MODEL.BN_GROUPS, cfg.SOLVER, cfg.SOLVER.MAX_ITER
    take_step = TrainStep(method, build_optimizer(cfg, method), total_steps=steps)
    generator = torch.Generator().manual_seed(cfg.SEED)
    seen: dict[str, list[float]] = {"company": [], "accuracy": [], "loss": []}
    for step in range(steps):
        rows = torch.randint(len(images), (solver.BATCH_SIZE,), generator=generator)
        view = images[rows]
        lr = learning_rate(
            step, steps, base=solver.BASE_LR, schedule="constant", warmup=solver.WARMUP_ITERS
        )
        outputs = take_step([view, partners(view, groups)], rows, step, lr)
        if step % MEASURED_EVERY == 0:
            with torch.no_grad():
                q = unit(method.encoder_q(view))
                k = method.encode_keys(partners(view, groups), step)
            seen["company"].append(100 * from_company(q, k, groups))
            seen["accuracy"].append(100 * outputs["accuracy"].item())
            seen["loss"].append(outputs["loss"].item())
    tenths = {name: [part.mean() for part in np.array_split(v, 10)] for name, v in seen.items()}
    result: dict[str, Any] = {name: float(parts[-1]) for name, parts in tenths.items()}
    return result | {"curve": [round(float(part), 2) for part in tenths["company"]]}


def read_images(names: list[str], size: int) -> Tensor:
    """Read all images into memory: (N, 3, size, size), standardised."""
    pixels = np.stack(
        [cv2.resize(cv2.imread(n), (size, size), interpolation=cv2.INTER_AREA) for n in names]
    )
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    return (images - images.mean()) / images.std()


if __name__ == "__main__":
    run_as_a_process(run)
