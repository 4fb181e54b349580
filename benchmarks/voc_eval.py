"""VOC evaluation compared with Detectron2's, on generated data of the size of VOC 2007 test.

4,952 images, 20 classes, 247,600 detections. Both evaluators receive the same predictions, read the
same XML files again in each round, and must produce identical metrics. They alternate; the median
of the ratios is printed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

import moco_det  # noqa: F401  (before Detectron2, whose output it silences)

# isort: split
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, register_pascal_voc
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import Boxes, Instances

from moco_det.evaluation.pascal_voc_evaluation import VOCEvaluator

OBJECT = (
    "<object><name>{}</name><pose>Unspecified</pose><truncated>0</truncated>"
    "<difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
    "<ymax>{}</ymax></bndbox></object>"
)


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw boxes in a 500 x 375 image: (count, 4) integer corners, counted from 1."""
    low = rng.integers(1, (400, 300), size=(count, 2))
    high = np.minimum(low + rng.integers(10, 200, size=(count, 2)), (500, 375))
    return np.concatenate([low, high], axis=1)


def write_data(folder: Path, images: int, per_image: int, seed: int = 0) -> list[tuple]:
    """Write a VOC folder with a split ``test``; return simulated (inputs, outputs)."""
    rng = np.random.default_rng(seed)
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    ids = [f"{number:06d}" for number in range(1, images + 1)]
    (folder / "ImageSets/Main/test.txt").write_text("\n".join(ids) + "\n")
    pairs = []
    for image_id in ids:
        count = 1 + rng.poisson(2)  # VOC 2007 test has about 3 objects an image, 19 % difficult
        boxes, labels = random_boxes(rng, count), rng.integers(0, len(CLASS_NAMES), count)
        objects = [
            OBJECT.format(CLASS_NAMES[label], int(rng.random() < 0.19), *box)
            for label, box in zip(labels, boxes, strict=True)
        ]
        size = "<size><width>500</width><height>375</height><depth>3</depth></size>"
        text = f"<annotation>{size}{''.join(objects)}</annotation>"
        (folder / "Annotations" / f"{image_id}.xml").write_text(text)

        # Half of the detections are jittered objects, some of them with a wrong class.
        found = random_boxes(rng, per_image).astype(np.float32)
        classes = rng.integers(0, len(CLASS_NAMES), per_image)
        source = rng.integers(0, count, per_image // 2)
        found[: len(source)] = boxes[source] + rng.normal(0, 8, (len(source), 4))
        classes[: len(source)] = np.where(rng.random(len(source)) < 0.9, labels[source], 0)
        instances = Instances((375, 500))
        instances.pred_boxes = Boxes(
            torch.from_numpy(found - np.array([1, 1, 0, 0], dtype=np.float32))
        )
        instances.scores = torch.from_numpy(rng.random(per_image).astype(np.float32) ** 3)
        instances.pred_classes = torch.from_numpy(classes)
        pairs.append(([{"image_id": image_id}], [{"instances": instances}]))
    return pairs


def timed(evaluator, pairs: list[tuple]) -> tuple[float, dict[str, float]]:
    """Return the seconds from the first prediction to the metrics, and the metrics."""
    start = time.perf_counter()
    evaluator.reset()
    for inputs, outputs in pairs:
        evaluator.process(inputs, outputs)
    results = evaluator.evaluate()["bbox"]
    return time.perf_counter() - start, results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (3)")
    parser.add_argument("--images", type=int, default=4952, help="generated images (4952)")
    parser.add_argument("--per-image", type=int, default=50, help="detections per image (50)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_data(Path(folder, "VOC"), args.images, args.per_image)
        register_pascal_voc("benchmark_voc", f"{folder}/VOC", "test", 2007)
        ratios = []
        for number in range(1, args.rounds + 1):
            parse_rec.cache_clear()
            theirs, expected = timed(PascalVOCDetectionEvaluator("benchmark_voc"), pairs)
            ours, results = timed(VOCEvaluator("benchmark_voc"), pairs)
            assert {key: results[key] for key in expected} == dict(expected), (results, expected)
            ratios.append(theirs / ours)
            print(
                f"round {number}: Detectron2 {theirs:.2f} s, ours {ours:.2f} s, "
                f"AP / AP50 / AP75 {results['AP']:.3f} / {results['AP50']:.3f} / "
                f"{results['AP75']:.3f}, identical",
                flush=True,
            )
        start = time.perf_counter()
        timed(VOCEvaluator("benchmark_voc", output_dir=f"{folder}/out"), pairs)
        print(f"ours, including writing the predictions: {time.perf_counter() - start:.2f} s")
    print(f"ratio voc_eval {statistics.median(ratios):.1f}")


if __name__ == "__main__":
    main()
