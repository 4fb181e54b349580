"""Tiny data in the layouts of PASCAL VOC and COCO, and weights of a narrow ResNet."""

import json
import os
import pickle
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest

# Processes that tests start inherit what is ignored: SIGHUP under nohup, SIGINT in the background
# of a shell script.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, on which the ranks of a test would crowd, unless asked for by ``-m gpu``."""
    config.addinivalue_line("markers", "gpu: needs a GPU; run by pytest -m gpu only")
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if config.option.markexpr != "gpu" and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run pytest -m gpu"))


# A ResNet-50 a sixteenth as wide, few proposals, small images: the protocols' own code in seconds.
NARROW = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "4"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
]
QUICK = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "10"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8"),
    *("MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)"),
    *("INPUT.MIN_SIZE_TEST", "64"),
    *("TEST.PRECISE_BN.NUM_ITER", "2"),
    *("DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.MAX_ITER", "2"),
    *("LOG_PERIOD", "1"),
]
CLASSES = ("bolt", "nut")
BOX = {"bolt": (10, 12, 50, 40), "nut": (30, 20, 80, 60)}  # x1, y1, x2, y2 in images of 96 x 80


def _write_image(path: Path, name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, (80, 96, 3), dtype=np.uint8)
    x1, y1, x2, y2 = BOX[name]
    image[y1:y2, x1:x2] += np.uint8(120)
    cv2.imwrite(str(path), image)


@pytest.fixture(scope="session")
def voc_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images to train on and two to test on, one object each, in the layout of VOC 2007."""
    root = tmp_path_factory.mktemp("voc")
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    names = [f"{i:06d}" for i in range(6)]
    for i, image in enumerate(names):
        name = CLASSES[i % 2]
        x1, y1, x2, y2 = BOX[name]
        _write_image(root / "JPEGImages" / f"{image}.jpg", name, seed=i)
        (root / "Annotations" / f"{image}.xml").write_text(
            f"<annotation><filename>{image}.jpg</filename><size><width>96</width>"
            "<height>80</height><depth>3</depth></size><object>"
            f"<name>{name}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin>"
            f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            "</annotation>"
        )
    (root / "ImageSets/Main/trainval.txt").write_text("\n".join(names[:4]) + "\n")
    (root / "ImageSets/Main/test.txt").write_text("\n".join(names[4:]) + "\n")
    return root


@pytest.fixture(scope="session")
def coco_spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four images with polygons, in the layout of COCO, as ``coco:JSON:IMAGES``."""
    root = tmp_path_factory.mktemp("coco")
    (root / "images").mkdir()
    images, annotations = [], []
    for i in range(4):
        name = CLASSES[i % 2]
        x1, y1, x2, y2 = BOX[name]
        _write_image(root / "images" / f"{i}.jpg", name, seed=i)
        images.append({"id": 10 + i, "file_name": f"{i}.jpg", "width": 96, "height": 80})
        annotations.append(
            {
                "id": i + 1,
                "image_id": 10 + i,
                "category_id": 7 + i % 2,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
            }
        )
    categories = [{"id": 7 + k, "name": name} for k, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    return f"coco:{root / 'instances.json'}:{root / 'images'}"


def narrow_backbone() -> dict[str, np.ndarray]:
    """Names and arrays of a backbone file for ``NARROW``, written down without Detectron2."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}

    def layer(name: str, n_out: int, n_in: int, size: int) -> None:
        arrays[f"{name}.weight"] = rng.normal(0, 0.1, (n_out, n_in, size, size))
        for leaf, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            arrays[f"{name}.norm.{leaf}"] = np.full(n_out, value) + rng.random(n_out) * 0.1

    layer("stem.conv1", 4, 3, 7)
    n_in = 4
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        inner, n_out = 4 * 2 ** (stage - 2), 16 * 2 ** (stage - 2)
        for block in range(blocks):
            at = f"res{stage}.{block}"
            if block == 0:
                layer(f"{at}.shortcut", n_out, n_in, 1)
            layer(f"{at}.conv1", inner, n_in, 1)
            layer(f"{at}.conv2", inner, inner, 3)
            layer(f"{at}.conv3", n_out, inner, 1)
            n_in = n_out
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted file, as the reference's converter writes it, with this project's metadata."""
    path = tmp_path_factory.mktemp("weights") / "narrow.pkl"
    metadata = {
        "pixel_mean": [120.0, 110.0, 100.0],
        "pixel_std": [58.395, 57.12, 57.375],
        "format": "RGB",
        "stride_in_1x1": False,
        "depth": 50,
        "num_groups": 1,
        "width_per_group": 4,
        "stem_out_channels": 4,
        "res2_out_channels": 16,
        "source": "checkpoint.pth",
        "source_sha256": "0" * 64,
        "version": "1",
    }
    content = {
        "model": narrow_backbone(),
        "__author__": "MOCO",
        "matching_heuristics": True,
        "metadata": metadata,
    }
    path.write_bytes(pickle.dumps(content))
    return path
