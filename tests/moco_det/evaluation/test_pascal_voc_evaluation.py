"""The VOC evaluator against Detectron2's own, to the last bit, and against one computed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

import moco_det  # noqa: F401
from moco_common.errors import UserError
from moco_det.data.register import register
from moco_det.evaluation.build import build_evaluator
from moco_det.evaluation.pascal_voc_ap import (
    Detections,
    GroundTruth,
    as_printed,
    average_precisions,
    to_voc_corners,
)
from moco_det.evaluation.pascal_voc_evaluation import VOCEvaluator

CLASSES = ("bird", "cat", "dog", "undetected", "horse", "unlabelled")
OBJECT = (
    "<object><name>{}</name><pose>Left</pose><truncated>0</truncated><difficult>{}</difficult>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
SIZE = "<size><width>64</width><height>48</height><depth>3</depth></size>"


def write_voc(folder, labelled, images=40, seed=0):
    """A VOC folder of small images; returns a made-up detector's (inputs, outputs)."""
    rng = np.random.default_rng(seed)
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    ids = [f"{number:06d}" for number in rng.permutation(images)]
    (folder / "ImageSets/Main/test.txt").write_text("\n".join(ids) + "\n")
    pairs = []
    for number, image_id in enumerate(ids):
        count = 0 if number == 3 else int(rng.integers(1, 6))
        low = rng.integers(1, (40, 30), size=(count, 2))
        boxes = np.concatenate([low, low + rng.integers(4, 18, size=(count, 2))], axis=1)
        labels = rng.integers(0, labelled, count)
        objects = "".join(
            OBJECT.format(CLASSES[label], int(rng.random() < 0.3), *box)
            for label, box in zip(labels, boxes, strict=True)
        )
        text = f"<annotation>{SIZE}{objects}</annotation>"
        (folder / "Annotations" / f"{image_id}.xml").write_text(text)
        Image.new("RGB", (64, 48)).save(folder / "JPEGImages" / f"{image_id}.jpg")

        chosen = rng.integers(0, max(count, 1), 12 if count else 0)
        found = boxes[chosen] + rng.normal(0, 1.5, (len(chosen), 4)) - [1, 1, 0, 0]
        guesses = np.where(rng.random(len(chosen)) < 0.8, labels[chosen], len(CLASSES) - 1)
        guesses[guesses == CLASSES.index("undetected")] = 0
        instances = Instances((48, 64))
        instances.pred_boxes = Boxes(torch.tensor(found, dtype=torch.float32).reshape(-1, 4))
        # Two digits: many equal scores within a class.
        instances.scores = torch.from_numpy(rng.random(len(chosen)).round(2).astype(np.float32))
        instances.pred_classes = torch.from_numpy(guesses)
        pairs.append(({"image_id": image_id}, {"instances": instances}))
    return pairs


def run(evaluator, pairs):
    evaluator.reset()
    for number in range(0, len(pairs), 3):
        inputs, outputs = zip(*pairs[number : number + 3], strict=True)
        evaluator.process(list(inputs), list(outputs))
    return evaluator.evaluate()["bbox"]


@pytest.fixture
def registered():
    """Names registered in a test, removed after it."""
    names = []
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("labelled", [4, 5])
def test_metrics_equal_detectron2s_to_the_last_bit(tmp_path, registered, year, labelled):
    """Ties, difficult objects, a class undetected, one without objects (NaN by all-point)."""
    pairs = write_voc(tmp_path / "VOC", labelled, seed=labelled)
    registered.append("voc_for_equality")
    register_pascal_voc("voc_for_equality", str(tmp_path / "VOC"), "test", year, CLASSES)
    expected = run(PascalVOCDetectionEvaluator("voc_for_equality"), pairs)
    results = run(VOCEvaluator("voc_for_equality"), pairs)
    assert np.isnan(expected["AP"]) == (year == 2012)
    for key in ("AP", "AP50", "AP75"):
        np.testing.assert_array_equal(results[key], expected[key])
    assert results["AP-undetected"] == 0

    # Without the class that no image has, the all-point means are finite: compare those as well.
    present = CLASSES[:labelled]
    kept = []
    for inputs, outputs in pairs:
        instances = outputs["instances"]
        kept.append((inputs, {"instances": instances[instances.pred_classes < labelled]}))
    registered.append("voc_for_equality_present")
    register_pascal_voc("voc_for_equality_present", str(tmp_path / "VOC"), "test", year, present)
    expected = run(PascalVOCDetectionEvaluator("voc_for_equality_present"), kept)
    results = run(VOCEvaluator("voc_for_equality_present"), kept)
    assert 10 < expected["AP50"] < 90
    assert {key: results[key] for key in expected} == dict(expected)

    # The same folder as own data, by the same metric.
    name = register(f"voc:{tmp_path / 'VOC'}:test", classes=present)
    metric = {2007: "11-point", 2012: "all-point"}[year]
    own = build_evaluator(name, output_dir=tmp_path / "out", metric=metric)
    assert run(own, kept) == results


def test_own_data_leave_a_class_without_objects_out_of_the_mean(tmp_path, caplog):
    pairs = write_voc(tmp_path / "VOC", labelled=5)
    name = register(f"voc:{tmp_path / 'VOC'}:test", classes=CLASSES)
    results = run(build_evaluator(name, output_dir=tmp_path), pairs)
    assert np.isnan(results["AP-unlabelled"])
    there = [results[f"AP-{label}"] for label in CLASSES[:5]]
    assert results["AP"] == pytest.approx(np.mean(there))
    assert caplog.messages == [
        f"warning: voc:{tmp_path / 'VOC'}:test has no object of unlabelled: not in the mean AP"
    ]


def test_average_precision_of_three_detections_by_hand():
    """Two objects, one of them difficult in a second image: 1/2, then 2/3 recall ... on paper."""
    truth = GroundTruth(
        image=np.array([0, 0, 1]),
        label=np.zeros(3, dtype=np.int64),
        boxes=np.array([[1, 1, 10, 10], [21, 21, 30, 30], [1, 1, 10, 10]], dtype=np.float64),
        difficult=np.array([False, False, True]),
    )
    # By score: a hit, the same object again (false), the difficult one (neither), the other one.
    found = Detections(
        image=np.array([0, 0, 1, 0]),
        label=np.zeros(4, dtype=np.int64),
        boxes=np.array([[1, 1, 10, 10], [1, 1, 10, 9], [1, 1, 10, 10], [21, 21, 30, 30.0]]),
        scores=np.array([0.9, 0.8, 0.7, 0.6]),
    )
    # Precision 1 at recall 1/2, then 2/3 at recall 1.
    every = average_precisions(truth, found, 1, metric="all-point", thresholds=[0.5])
    assert every.item() == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    eleven = average_precisions(truth, found, 1, metric="11-point", thresholds=[0.5])
    assert eleven.item() == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    # An IoU of exactly the threshold is no match: 9 of 10 rows overlap.
    strict = Detections(*(a[1:2] for a in (found.image, found.label, found.boxes, found.scores)))
    at = average_precisions(truth, strict, 1, metric="all-point", thresholds=[0.89, 0.9])
    np.testing.assert_allclose(at.ravel(), [0.5, 0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rounding_equals_printing_and_parsing(dtype):
    rng = np.random.default_rng(0)
    ties = np.arange(-400, 400) / 16
    values = np.concatenate([rng.normal(0, 300, 3000), ties, ties / 16]).astype(dtype)
    for digits in (1, 3):
        printed = [float(f"{value:.{digits}f}") for value in values]
        np.testing.assert_array_equal(as_printed(values, digits), printed)


def test_corners_equal_those_that_detectron2_prints():
    rng = np.random.default_rng(0)
    boxes = rng.normal(100, 300, (2000, 4)).astype(np.float32)
    printed = []
    for x0, y0, x1, y1 in boxes:
        x0 += 1
        y0 += 1
        printed.append([float(f"{value:.1f}") for value in (x0, y0, x1, y1)])
    np.testing.assert_array_equal(to_voc_corners(boxes), printed)


def test_predictions_and_class_table_are_kept(tmp_path):
    pairs = write_voc(tmp_path / "VOC", labelled=5)
    name = register(f"voc:{tmp_path / 'VOC'}:test", classes=CLASSES)
    results = run(build_evaluator(name, output_dir=tmp_path / "out"), pairs)
    kept = json.loads((tmp_path / "out/coco_instances_results.json").read_text())
    image, output = pairs[0]
    mine = [row for row in kept if row["image_id"] == image["image_id"]]
    boxes = output["instances"].pred_boxes.tensor.numpy()
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    np.testing.assert_array_equal(np.float32([row["bbox"] for row in mine]), boxes)
    assert [row["category_id"] for row in mine] == output["instances"].pred_classes.tolist()
    table = json.loads((tmp_path / "out/voc_results.json").read_text())
    assert np.mean(table["AP"]["cat"]) == pytest.approx(results["AP-cat"])
    assert table["AP"]["unlabelled"] == [None] * 10


def test_a_repeated_image_counts_once_and_a_lost_or_foreign_one_is_an_error(tmp_path, caplog):
    pairs = write_voc(tmp_path / "VOC", labelled=5, images=5)
    evaluator = build_evaluator(register(f"voc:{tmp_path / 'VOC'}:test"), output_dir=tmp_path)
    assert run(evaluator, [*pairs[::-1], pairs[0]]) == run(evaluator, pairs)
    assert "1 images of" in caplog.text
    with pytest.raises(UserError, match=f"not evaluated .*{pairs[-1][0]['image_id']}"):
        run(evaluator, pairs[:-1])
    foreign = ({"image_id": "elsewhere"}, pairs[0][1])
    with pytest.raises(UserError, match="image elsewhere is not of"):
        run(evaluator, [*pairs, foreign])


def test_an_unknown_metric_task_or_data_set_is_named(tmp_path):
    write_voc(tmp_path / "VOC", labelled=2, images=2)
    name = register(f"voc:{tmp_path / 'VOC'}:test")
    with pytest.raises(UserError, match="'12-point'"):
        build_evaluator(name, output_dir=tmp_path, metric="12-point")
    with pytest.raises(UserError, match="boxes only"):
        build_evaluator(name, output_dir=tmp_path, tasks=["segm"])
    with pytest.raises(UserError, match="'nothing' is not registered"):
        build_evaluator("nothing", output_dir=Path(tmp_path))
