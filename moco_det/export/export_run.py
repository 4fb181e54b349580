"""Export of the detector of a fine-tuning run to one file, verified before it is written."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNN
from numpy.typing import NDArray

from moco_common.dependencies import require
from moco_common.errors import UserError
from moco_common.files import replace_file
from moco_common.text import counted
from moco_common.version import __version__
from moco_det.demo.scenes import draw_scene
from moco_det.export.comparison import Agreement
from moco_det.export.graph import (
    MASK_THRESHOLD,
    Exported,
    Settings,
    onnx,
    onnx_runner,
    torchscript,
    trace,
)
from moco_det.inference.predictor import Detector, predictor_of_run
from moco_det.structures.objects import Objects

Images = Mapping[str, NDArray[np.uint8]]
EXTRA = "it for ONNX: pip install 'moco-det[export]'."


@dataclass(frozen=True)
class Export:
    """A written export.

    Attributes:
        file: the exported file.
        settings: what it says about its input and output.
        agreement: comparison with the detector.
        images: number of images compared.
        seconds, detector_seconds: time per image of the exported file and of the detector, with
            resizing and masks.
    """

    file: Path
    settings: Settings
    agreement: Agreement
    images: int
    seconds: float
    detector_seconds: float

    def __str__(self) -> str:
        size = self.file.stat().st_size / 2**20
        objects = counted(self.agreement.objects, "object")
        compared = f"{objects} in {counted(self.images, 'image')}: {self.agreement}"
        if not self.agreement.objects:
            compared = "no object found in any image: pass images of your own data to compare on"
        lines = (
            f"exported   {self.file} ({size:.0f} MB): {', '.join(self.settings.outputs)}; one "
            "image of any size per call",
            f"verified   {compared}",
            f"time       {self.seconds:.3f} s per image, the detector {self.detector_seconds:.3f} "
            f"s (CPU, {counted(torch.get_num_threads(), 'thread')})",
        )
        return "\n".join(lines)


def export_detector(
    run: str | Path,
    output: str | Path,
    *,
    images: Images | None = None,
    score_threshold: float = 0.05,
) -> Export:
    """Export the detector of a fine-tuning run, with or without masks.

    Args:
        run: directory of the run.
        output: file to write: ``.onnx``, or ``.pt`` for TorchScript.
        images: RGB images (H, W, 3) by name, on which the file must find what the detector finds;
            default: `example_images`.
        score_threshold: lowest score in the output.

    Raises:
        UserError: the run has no detector that can be exported, or the file would find something
            else; nothing is written then.
    """
    output = Path(output)
    if output.suffix == ".onnx":
        require("export", "onnx", EXTRA)
        require("export", "onnxruntime", EXTRA)
    detector = predictor_of_run(run, score_threshold)
    model = detector.model
    if not isinstance(detector, Detector) or not isinstance(model, GeneralizedRCNN):
        raise UserError(f"{run} is not a run of a detector with boxes: only these are exported.")
    if getattr(model.roi_heads, "keypoint_on", False):
        raise UserError(f"{run} detects keypoints, which are not exported: use moco-predict.")
    model.cpu()
    traced, outputs = trace(model)
    settings = Settings(
        class_names=detector.class_names,
        image_format=detector.image_format,
        short_side=int(detector.resize.short_edge_length[0]),
        long_side=int(detector.resize.max_size),
        pixel_mean=model.pixel_mean.flatten().tolist(),
        pixel_std=model.pixel_std.flatten().tolist(),
        score_threshold=score_threshold,
        mask_threshold=MASK_THRESHOLD,
        outputs=outputs,
        version=__version__,
    )
    if output.suffix == ".onnx":
        content = onnx(traced, settings)
        run_graph = onnx_runner(content, torch.get_num_threads())
    else:
        content = torchscript(traced, settings)
        run_graph = traced
    exported = Detector(
        Exported(run_graph),
        detector.class_names,
        detector.image_format,
        settings.short_side,
        settings.long_side,
        score_threshold,
    )
    most = int(model.roi_heads.box_predictor.test_topk_per_image)
    agreement, seconds = Agreement(), np.zeros(2)
    compared = images or example_images()
    for form in (detector, exported):  # the first call of each sets things up, and is not timed
        form(next(iter(compared.values())))
    for name, image in compared.items():
        expected, found = _timed(detector, image), _timed(exported, image)
        agreement.add(expected[0], found[0], score_threshold, most, name)
        seconds += found[1], expected[1]
    if agreement.faults:
        raise UserError(
            f"{output} is not written, because the exported graph differs from the detector in "
            f"{counted(len(agreement.faults), 'object')}, first {agreement.faults[0]}: try other "
            "versions of torch and onnxruntime, or the other format."
        )
    replace_file(output, lambda file: file.write(content))
    return Export(output, settings, agreement, len(compared), *(seconds / len(compared)).tolist())


def _timed(detector: Detector, image: NDArray[np.uint8]) -> tuple[Objects, float]:
    start = time.perf_counter()
    return detector(image), time.perf_counter() - start


def example_images() -> dict[str, NDArray[np.uint8]]:
    """Draw three scenes of the demo: a wide image, a tall one and a square one."""
    sizes = ((320, 480), (480, 320), (400, 400))
    return {
        f"scene {seed}": draw_scene(np.random.default_rng(seed), max(size))[0][: size[0], : size[1]]
        for seed, size in enumerate(sizes)
    }
