"""Fine-tuning in the check of a GPU: its losses against the CPU's, and its speed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moco_det.demo.scene_dataset import write_scenes
from moco_det.engine.setup import Options
from moco_det.engine.train_net import train_net

Found = tuple[str, str, bool | None]
NARROW: dict[str, Any] = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 4,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "TEST.PRECISE_BN.NUM_ITER": 2,
    "DATALOADER.NUM_WORKERS": 0,
}


def fine_tuning(device: torch.device, tiny: bool, seconds: float, folder: Path) -> Iterator[Found]:
    """Compare the first losses with the CPU's, and time two protocols at their own size."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    data = {"VOC-random": "voc", "COCO-FPN-1x-random": "coco"}
    for _ in write_scenes(folder / "scenes", unlabelled=1, train=8, test=2, processes=1):
        pass
    specs = {
        "voc": [f"voc:{folder / 'scenes/voc'}:{part}" for part in ("train", "test")],
        "coco": [
            f"coco:{folder / f'scenes/coco/instances_{part}.json'}:"
            f"{folder / 'scenes/voc/JPEGImages'}"
            for part in ("train", "test")
        ],
    }
    steps = 2 if tiny else 10
    for protocol, kind in data.items():
        rows = {
            where: _losses(protocol, specs[kind], folder / protocol / where, where, steps)
            for where in dict.fromkeys(("cpu", device.type))
        }
        exact, found = rows["cpu"], rows[device.type]
        far = max(abs(a - b) / max(a, 1e-6) for a, b in zip(exact, found, strict=True))
        yield f"{protocol}: losses of {steps} steps", f"{far:.1e} from the CPU's", far < 0.05
    if not tiny:
        for protocol, kind in data.items():
            path = folder / protocol / "speed"
            _train(protocol, specs[kind], path, {"SOLVER.MAX_ITER": 60, "LOG_PERIOD": 20})
            last = _metrics(path)[-1]["time"]
            yield f"{protocol}, its own batch and image sizes", f"{1 / last:.2f} iterations/s", None


def _losses(protocol: str, specs: list[str], folder: Path, device: str, steps: int) -> list[float]:
    settings = NARROW | {"MODEL.DEVICE": device, "SOLVER.MAX_ITER": steps, "LOG_PERIOD": 1}
    _train(protocol, specs, folder, settings)
    return [line["total_loss"] for line in _metrics(folder) if "total_loss" in line]


def _train(protocol: str, specs: list[str], folder: Path, settings: dict[str, Any]) -> None:
    overrides = [str(word) for pair in settings.items() for word in pair]
    train_data, test_data = specs
    train_net(
        Options(
            config=protocol,
            train_data=(train_data,),
            test_data=test_data,
            output_dir=str(folder),
            overrides=overrides,
            quiet=True,
        )
    )


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
