"""A detector as one graph from an image to its objects, in ONNX or TorchScript.

Both formats come from one trace through Detectron2's ``TracingAdapter``:

    image (3, H, W) float32, 0 to 255
        ->  boxes (N, 4), scores (N,), classes (N,)[, masks (N, m, m)]

Normalisation, padding, proposals and NMS are inside the graph. Resizing before it, scaling of the
boxes and pasting of the masks after it are described by `Settings`, which the file carries.
"""

import inspect
import io
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

METADATA = "moco_det"  # key of the settings in an ONNX file; in TorchScript the file moco_det.json
OPSET = 16  # the first with Detectron2's RoIAlign, which is shifted by half a pixel
MASK_THRESHOLD = 0.5  # the default of Detectron2's detector_postprocess
Run = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Settings:
    """The facts that a program needs in order to use an exported detector, stored as JSON.

    Attributes:
        class_names: names in the order of ``classes``.
        image_format: "RGB" or "BGR", the channel order of the input.
        short_side, long_side: the shorter side of the image is resized to ``short_side`` (0 for no
            resizing), or less if the longer one would exceed ``long_side``; bilinear, anti-aliased.
        pixel_mean, pixel_std: subtracted and divided by inside the graph; for information only.
        score_threshold: lowest score in the output.
        mask_threshold: probability from which a pixel belongs to the object.
        outputs: names of the outputs.
        version: of this project.
    """

    class_names: list[str]
    image_format: str
    short_side: int
    long_side: int
    pixel_mean: list[float]
    pixel_std: list[float]
    score_threshold: float
    mask_threshold: float
    outputs: list[str]
    version: str

    def json(self) -> str:
        """Return the settings as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


def trace(model: GeneralizedRCNN) -> tuple[torch.jit.ScriptModule, list[str]]:
    """Trace a detector in evaluation mode; return the graph and the names of its outputs."""
    # The graph is the same for every image: none of the sizes is kept as a constant.
    image = torch.full((3, 320, 416), 128.0)
    adapter = TracingAdapter(model, [{"image": image}], _objects).eval().requires_grad_(False)
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(adapter, (image,), check_trace=False)
    return traced, ["boxes", "scores", "classes", "masks"][: len(traced(image))]


def _objects(model: GeneralizedRCNN, inputs: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    (found,) = model.inference(inputs, do_postprocess=False)
    objects = (found.pred_boxes.tensor, found.scores, found.pred_classes)
    # Nx1xMxM -> NxMxM
    return (*objects, found.pred_masks.squeeze(1)) if found.has("pred_masks") else objects


def torchscript(traced: torch.jit.ScriptModule, settings: Settings) -> bytes:
    """Return the content of a TorchScript file."""
    file = io.BytesIO()
    with _quiet():
        torch.jit.save(traced, file, _extra_files={f"{METADATA}.json": settings.json()})
    return file.getvalue()


def onnx(traced: torch.jit.ScriptModule, settings: Settings) -> bytes:
    """Return the content of an ONNX file."""
    from onnx import checker, helper, load_from_string

    file: Any = io.BytesIO()  # which the exporter takes, unlike what its types say
    # torch 2.1 has this exporter only.
    newer = "dynamo" in inspect.signature(torch.onnx.export).parameters
    exporter: dict[str, Any] = {"dynamo": False} if newer else {}
    with _quiet():
        torch.onnx.export(
            traced,
            (torch.full((3, 320, 416), 128.0),),
            file,
            opset_version=OPSET,
            input_names=["image"],
            output_names=settings.outputs,
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "objects"} for name in settings.outputs},
            },
            **exporter,
        )
    model = load_from_string(file.getvalue())
    helper.set_model_props(model, {METADATA: settings.json()})
    checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def onnx_runner(content: bytes, threads: int) -> Run:
    """Return a function that runs an ONNX file by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # of its warnings on outputs that are empty
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> list[Tensor]:
        return [torch.from_numpy(np.array(a)) for a in session.run(None, {"image": image.numpy()})]

    return run


class Exported(nn.Module):
    """An exported graph with the interface of a Detectron2 model.

    Args:
        run: computes the outputs for an image (3, H, W).
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Return ``[{"instances": objects in the original image}]``, for a single image."""
        (given,) = inputs
        boxes, scores, classes, *masks = self.run(given["image"])
        found = Instances(tuple(given["image"].shape[1:]))
        found.pred_boxes, found.scores, found.pred_classes = Boxes(boxes), scores, classes
        if masks:
            found.pred_masks = masks[0][:, None]  # Nx1xMxM
        found = detector_postprocess(found, given["height"], given["width"], MASK_THRESHOLD)
        return [{"instances": found}]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of the tracer, whose result is compared with the detector, and torch's
    advice to use ``torch.export``, which cannot follow a number of objects that depends on the
    image."""
    with warnings.catch_warnings():
        for kind in (torch.jit.TracerWarning, DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", kind)
        yield
