"""COCO evaluation compared with pycocotools, on generated data of the size of COCO val2017.

Boxes, masks and keypoints: 5,000 images, 80 classes (keypoints: 1), 36,750 objects, 100,000
detections. Both start from the same annotations and detections in memory and must produce identical
statistics. They alternate in each round; the median of the ratios is printed.
"""

import argparse
import contextlib
import copy
import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from moco_det.evaluation.coco_metrics import TASKS, coco_metrics

WIDTH, HEIGHT = 640, 480
OBJECTS_PER_IMAGE = 7.35  # as in val2017: 36,781 in 5,000 images
CROWDS = 0.012


def generate(
    task: str, images: int, detections: int, classes: int = 80, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Generate ground truth and the results of a detector: 40 % jittered objects, 60 % noise."""
    rng = np.random.default_rng(seed)
    classes = 1 if task == "keypoints" else classes
    class_ids = np.sort(rng.permutation(classes + classes // 8)[:classes]) + 1
    image_ids = np.sort(rng.permutation(600_000)[:images])
    count = round(images * OBJECTS_PER_IMAGE)
    image = rng.integers(0, images, count)
    label = np.minimum(rng.geometric(0.06, count), classes) - 1  # a few classes are common
    size = np.exp(rng.normal(4, 1, (count, 2))).clip(4, 400)
    low = rng.random((count, 2)) * ([WIDTH, HEIGHT] - size)
    boxes = np.concatenate([low, size], axis=1).round(2)
    truth: dict[str, list[dict[str, Any]]] = {
        "images": [{"id": int(key), "width": WIDTH, "height": HEIGHT} for key in image_ids],
        "categories": [{"id": int(key), "name": f"class {key}"} for key in class_ids],
        "annotations": [
            {
                "id": number + 1,
                "image_id": int(image_ids[image[number]]),
                "category_id": int(class_ids[label[number]]),
                "area": float(box[2] * box[3] * 0.6),
                "iscrowd": int(rng.random() < CROWDS),
                **_shape(task, box, rng),
            }
            for number, box in enumerate(boxes)
        ],
    }
    source = rng.integers(0, count, detections)
    hit = rng.random(detections) < 0.4
    found = boxes[source] + rng.normal(0, 0.08, (detections, 4)) * np.tile(size[source], 2)
    moved = np.concatenate([found[:, :2].clip(0, 400), found[:, 2:].clip(1, 400)], axis=1)
    where = np.where(hit, image[source], rng.integers(0, images, detections))
    wrong = rng.random(detections) > 0.85
    what = np.where(wrong, rng.integers(0, classes, detections), label[source])
    score = (rng.random(detections) ** 2 * 0.7 + 0.3 * hit).astype(np.float32)
    results = [
        {
            "image_id": int(image_ids[where[k]]),
            "category_id": int(class_ids[what[k]]),
            "score": float(score[k]),
            **_shape(task, moved[k].astype(np.float32), rng),
        }
        for k in np.argsort(where, kind="stable")
    ]
    if task == "keypoints":  # as in COCO, the keypoints of a person lie within the box
        for item in truth["annotations"]:
            item["num_keypoints"] = 17
    return truth, results


def _shape(task: str, box: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    x, y, w, h = box.tolist()
    shape: dict[str, Any] = {"bbox": [x, y, w, h]}
    if task == "segm":
        turn = np.linspace(0, 2 * np.pi, 16, endpoint=False)
        ring = [x, y] + np.stack([1 + np.cos(turn), 1 + np.sin(turn)], 1) * [w / 2, h / 2]
        code = coco_mask.merge(coco_mask.frPyObjects([ring.ravel().tolist()], HEIGHT, WIDTH))
        shape = {"segmentation": {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()}}
    elif task == "keypoints":
        grid = np.stack(np.divmod(np.arange(17), 5), axis=1) / 5  # same layout in every object
        points = [x, y] + grid * [w, h] + rng.normal(0, 0.03, (17, 2)) * [w, h]
        labelled = np.full((17, 1), 2.0)
        shape["keypoints"] = np.concatenate([points, labelled], axis=1).ravel().round(2).tolist()
    return shape


def by_pycocotools(truth: dict[str, Any], results: list[dict[str, Any]], task: str) -> np.ndarray:
    """Compute ``COCOeval.stats`` with the reference implementation, which modifies its inputs."""
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = truth
        dataset.createIndex()
        evaluation = COCOeval(dataset, dataset.loadRes(results), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats)


def by_hotcoco(truth: dict[str, Any], results: list[dict[str, Any]], task: str) -> np.ndarray:
    """Compute the same statistics as this project's evaluator does."""
    return coco_metrics(truth, results, [task], library="hotcoco")[task].stats()


def timed(evaluate: Callable[..., np.ndarray], *content: Any) -> tuple[float, np.ndarray]:
    """Return the seconds taken and the statistics; copying the inputs is not timed."""
    own = copy.deepcopy(content)
    start = time.perf_counter()
    stats = evaluate(*own)
    return time.perf_counter() - start, stats


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (3)")
    parser.add_argument("--images", type=int, default=5000, help="generated images (5000)")
    parser.add_argument(
        "--detections", type=int, default=100_000, help="generated detections (100000)"
    )
    parser.add_argument(
        "--task", choices=TASKS, nargs="+", default=TASKS, help="tasks to time (default: all)"
    )
    args = parser.parse_args(argv)
    for task in args.task:
        compare(task, args.images, args.detections, args.rounds)


def compare(task: str, images: int, detections: int, rounds: int) -> None:
    """Time both alternately for ``rounds`` rounds; print the median of the ratios.

    Raises:
        AssertionError: a statistic differs in any bit.
    """
    content = (*generate(task, images, detections), task)
    ratios = []
    for number in range(1, rounds + 1):
        theirs, expected = timed(by_pycocotools, *content)
        ours, stats = timed(by_hotcoco, *content)
        np.testing.assert_array_equal(stats, expected)
        ratios.append(theirs / ours)
        print(
            f"{task}, round {number}: pycocotools {theirs:.2f} s, ours {ours:.3f} s, "
            f"AP / AP50 / AP75 {' / '.join(f'{value:.4f}' for value in stats[:3])}, "
            f"all {len(stats)} identical",
            flush=True,
        )
    suffix = "" if task == "bbox" else f"_{task}"
    print(f"ratio coco_eval{suffix} {statistics.median(ratios):.1f}")


if __name__ == "__main__":
    main()
