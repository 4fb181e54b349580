"""The command lines as functions: fine-tune, evaluate, predict.

Mistakes in the input raise `moco_common.errors.UserError`. Settings are configuration keys with
their values, such as ``{"SOLVER.MAX_ITER": 4000}``; a run is one directory, as on the command line.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from numpy.typing import NDArray

from moco_common.errors import UserError
from moco_common.files import read_json
from moco_det.engine.setup import Options
from moco_det.engine.train_net import train_net
from moco_det.evaluation.results import results_folder
from moco_det.inference.predictor import Detector, load_image, predictor_of_run


def train(
    protocol: str | Path,
    *,
    output_dir: str | Path,
    train_data: str | Sequence[str] = (),
    test_data: str | None = None,
    settings: Mapping[str, object] | None = None,
    num_gpus: int = 1,
    resume: bool = False,
    strict: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Fine-tune a detector and evaluate it: ``moco-train-net``.

    With several processes, call it below ``if __name__ == "__main__":``, because they import the
    calling program again.

    Args:
        protocol: name of a protocol, such as "VOC" or "COCO-FPN-1x-random", or a YAML file.
        output_dir: directory of the run.
        train_data: specifications such as "voc:DIR:trainval"; default: the protocol's data sets.
        test_data: likewise, of the test set.
        settings: configuration keys and values, such as ``{"MODEL.WEIGHTS": "moco.pkl"}``.
        num_gpus: number of processes, on GPUs if there are any.
        resume: whether to resume from the newest checkpoint of the run, if there is one.
        strict: whether every problem in own data is an error.
        quiet: whether to print warnings only.

    Returns:
        The content of the run's ``results.json``: ``results["bbox"]["AP"]`` and so on.

    Raises:
        UserError: the input is wrong.
        Stopped: a signal ended the run; its state is saved.
    """
    train_net(
        Options(
            config=str(protocol),
            train_data=(train_data,) if isinstance(train_data, str) else tuple(train_data),
            test_data=test_data,
            num_gpus=num_gpus,
            resume=resume,
            output_dir=str(output_dir),
            overrides=_pairs(settings),
            strict=strict,
            quiet=quiet,
        )
    )
    return _results(Path(output_dir))


def evaluate(
    run: str | Path,
    *,
    test_data: str | None = None,
    settings: Mapping[str, object] | None = None,
    num_gpus: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run: ``moco-train-net --eval-only``.

    Args:
        run: directory of a fine-tuning run.
        test_data: test set, such as "coco:JSON:IMAGES"; default: the run's own.
        settings: configuration keys and values; ``MODEL.WEIGHTS`` chooses another checkpoint.
        num_gpus: number of processes, on GPUs if there are any.
        quiet: whether to print warnings only.

    Returns:
        The content of ``results.json``, as from :func:`train`.

    Raises:
        UserError: there is nothing to evaluate, or the input is wrong.
    """
    train_net(
        Options(
            test_data=test_data,
            num_gpus=num_gpus,
            eval_only=True,
            output_dir=str(run),
            overrides=_pairs(settings),
            quiet=quiet,
        )
    )
    return _results(Path(run) if test_data is None else results_folder(run, test_data))


class Predictor:
    """The detector of a run, for single images: ``moco-predict``.

    Args:
        run: directory of a fine-tuning run.
        threshold: lowest score of an object, in [0, 1].

    Attributes:
        class_names: names in the order of ``pred_classes``.

    Raises:
        UserError: a file of the run is missing or unreadable, or it is no run of a detector.
    """

    def __init__(self, run: str | Path, *, threshold: float = 0.5) -> None:
        detector = predictor_of_run(run, threshold)
        if not isinstance(detector, Detector):
            raise UserError(f"{run} labels pixels: use moco_det.inference.predictor.Segmenter.")
        self._detector = detector
        self.class_names = detector.class_names

    @torch.inference_mode()
    def __call__(self, image: NDArray[np.uint8] | str | Path) -> Instances:
        """Detect objects in an image, in order of decreasing score.

        Args:
            image: RGB (H, W, 3) uint8, or an image file.

        Returns:
            Detectron2's `Instances` on the CPU: ``pred_boxes`` in pixels of the image, ``scores``,
            ``pred_classes`` and, of a detector with masks, ``pred_masks`` (N, H, W) bool.

        Raises:
            UserError: the file cannot be read as an image.
        """
        pixels = load_image(image) if isinstance(image, str | Path) else image
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise UserError(
                f"an image is an array (H, W, 3) of uint8, not {pixels.shape} of {pixels.dtype}: "
                "convert it, or pass the file."
            )
        found: Instances = self._detector.run(pixels)["instances"].to("cpu")
        return found


def _pairs(settings: Mapping[str, object] | None) -> list[str]:
    return [word for key, value in (settings or {}).items() for word in (key, str(value))]


def _results(folder: Path) -> dict[str, Any]:
    """Read results.json; empty for a run without a test set."""
    file = folder / "results.json"
    if not file.is_file():
        return {}
    try:
        results = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} ({error}): evaluate the run again.") from None
    if not isinstance(results, dict):
        raise UserError(f"{file} does not hold results by task: evaluate the run again.")
    return results
