"""COCO's metrics by both libraries, to the last bit, on data full of ties, crowds and edges."""

import contextlib
import copy
import io
import json
import sys

import hotcoco
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.coco_eval import by_hotcoco, by_pycocotools, generate
from moco_common.errors import UserError
from moco_det.evaluation.coco_metrics import coco_metrics
from moco_det.evaluation.lvis_evaluation import lvis_metrics

SIDE = 60


def random_mask(rng):
    """RLE, area and box of a ragged rectangle, which may be empty."""
    x, y = rng.integers(0, 16, 2)
    w, h = rng.integers(
        0, 44, 2
    )  # on both sides of 32 x 32 pixels, the box more often than the mask
    pixels = np.zeros((SIDE, SIDE), np.uint8, order="F")
    pixels[y : y + h, x : x + w] = rng.random((h, w)) < 0.8
    code = coco_mask.encode(pixels)
    mask = {"size": [SIDE, SIDE], "counts": code["counts"].decode()}
    return mask, float(coco_mask.area(code)), coco_mask.toBbox(code).tolist()


def random_object(rng, truth, images, classes):
    mask, area, box = random_mask(rng)
    x, y, w, h = box
    points = np.zeros((17, 3))
    points[:, :2] = [x, y] + rng.random((17, 2)) * [w, h]
    points[:, 2] = rng.integers(0, 3, 17) if truth else 1
    if truth and rng.random() < 0.2:
        points[:] = 0
    item = {
        "image_id": int(rng.choice(images)),
        "category_id": int(rng.choice(classes)),
        "bbox": box,
        "segmentation": mask,
        "keypoints": points.round(2).ravel().tolist(),
    }
    if not truth:
        return {**item, "score": round(float(rng.random()), 1)}  # many equal scores
    if rng.random() < 0.3:
        item["segmentation"] = [rng.integers(0, SIDE, 8).astype(float).tolist()]
    area = float(rng.choice([area, 32.0**2, 96.0**2, 5e4]))  # the limits between sizes as well
    count = int((points[:, 2] > 0).sum())
    return {**item, "area": area, "iscrowd": int(rng.random() < 0.2), "num_keypoints": count}


def random_case(seed):
    """(ground truth, results): few images, crowds, empty images, near copies, equal scores."""
    rng = np.random.default_rng(seed)
    images = rng.permutation(50)[: rng.integers(1, 6)].tolist()
    classes = rng.permutation(20)[: rng.integers(1, 4)].tolist()
    annotations = [random_object(rng, True, images, classes) for _ in range(rng.integers(0, 14))]
    results = [random_object(rng, False, images, classes) for _ in range(rng.integers(1, 30))]
    for number, item in enumerate(annotations):
        item["id"] = number + 1
        if rng.random() < 0.7:
            near = {k: item[k] for k in ("image_id", "category_id", "keypoints", "bbox")}
            x, y, w, h = item["bbox"]
            near["bbox"] = [x + int(rng.integers(-1, 2)), y + int(rng.integers(-1, 2)), w, h]
            is_rle = isinstance(item["segmentation"], dict)
            near["segmentation"] = item["segmentation"] if is_rle else random_mask(rng)[0]
            results.append({**near, "score": round(float(rng.random()), 1)})
    truth = {
        "images": [{"id": key, "width": SIDE, "height": SIDE} for key in images],
        "categories": [{"id": key, "name": f"class {key}"} for key in classes],
        "annotations": annotations,
    }
    return truth, results


def reference(truth, results, task, **params):
    """COCOeval of pycocotools, by its own interface."""
    keys = {"bbox": ["bbox"], "segm": ["segmentation"], "keypoints": ["bbox", "keypoints"]}[task]
    keys += ["image_id", "category_id", "score"]
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = copy.deepcopy(truth)
        dataset.createIndex()
        detections = dataset.loadRes([{k: copy.deepcopy(r[k]) for k in keys} for r in results])
        evaluation = COCOeval(dataset, detections, task)
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("library", ["hotcoco", "pycocotools"])
def test_every_statistic_is_that_of_pycocotools_to_the_last_bit(library):
    found = 0
    for seed in range(40 if library == "hotcoco" else 12):
        truth, results = random_case(seed)
        before = copy.deepcopy((truth, results))
        metrics = coco_metrics(truth, results, ["bbox", "segm", "keypoints"], library=library)
        assert (truth, results) == before
        for task, ours in metrics.items():
            expected = reference(truth, results, task)
            np.testing.assert_array_equal(ours.precision, expected.eval["precision"])
            np.testing.assert_array_equal(ours.recall, expected.eval["recall"])
            np.testing.assert_array_equal(ours.stats(), expected.stats)
            assert ours.library == library
            found += ours.stats()[0] > 0.05
    assert found > 10


@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
def test_the_benchmarks_data_give_one_and_the_same_statistics(task):
    content = (*generate(task, images=40, detections=1500, classes=9), task)
    stats = by_hotcoco(*copy.deepcopy(content))
    np.testing.assert_array_equal(stats, by_pycocotools(*copy.deepcopy(content)))
    assert stats[0] > 0.01


def test_chosen_images_sigmas_and_limits_are_those_of_pycocotools():
    for seed in range(8):
        truth, results = random_case(seed)
        chosen = [image["id"] for image in truth["images"]][:2]
        ours = coco_metrics(truth, results, ["bbox"], image_ids=chosen, max_detections=12)["bbox"]
        expected = reference(truth, results, "bbox", imgIds=chosen, maxDets=[1, 10, 12])
        np.testing.assert_array_equal(ours.precision, expected.eval["precision"])
        np.testing.assert_array_equal(ours.recall, expected.eval["recall"])
        sigmas = np.linspace(0.02, 0.2, 17)
        ours = coco_metrics(truth, results, ["keypoints"], sigmas=sigmas)["keypoints"]
        expected = reference(truth, results, "keypoints", kpt_oks_sigmas=sigmas)
        np.testing.assert_array_equal(ours.stats(), expected.stats)


def test_ids_of_any_kind_change_nothing():
    """Text for images, and an annotation 0, for which pycocotools alone loses the object."""
    truth, results = random_case(7)
    expected = coco_metrics(truth, results, ["bbox"])["bbox"].stats()
    assert expected[0] > 0
    text = {image["id"]: f"image {image['id']:04d}" for image in truth["images"]}
    other = copy.deepcopy(truth)
    for image in other["images"]:
        image["id"] = text[image["id"]]
    for number, item in enumerate(other["annotations"]):
        item |= {"id": number, "image_id": text[item["image_id"]]}
    named = [{**result, "image_id": text[result["image_id"]]} for result in results]
    zero = copy.deepcopy(truth)
    for number, item in enumerate(zero["annotations"]):
        item["id"] = number
    for library in ("hotcoco", "pycocotools"):
        for content, found in ((other, named), (zero, results)):
            stats = coco_metrics(content, found, ["bbox"], library=library)["bbox"].stats()
            np.testing.assert_array_equal(stats, expected)


@pytest.mark.parametrize("library", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize("base", [-5, 2**31, 2**53, 2**63 - 3, 2**64, 3**90])
def test_ids_of_any_size_change_nothing(library, base):
    """Consecutive ids above 2^53 are equal as float64: perfect detections scored 0 and 50 %."""
    truth, results = random_case(7)
    expected = {
        task: coco_metrics(truth, results, [task])[task] for task in ("bbox", "segm", "keypoints")
    }

    def moved(items, **keys):
        return [{**item, **{k: item[k] + base for k in keys}} for item in items]

    large = {
        **truth,
        "images": moved(truth["images"], id=1),
        "categories": moved(truth["categories"], id=1),
        "annotations": moved(truth["annotations"], image_id=1, category_id=1),
    }
    found = moved(results, image_id=1, category_id=1)
    before = copy.deepcopy((large, found))
    metrics = coco_metrics(large, found, list(expected), library=library)
    for task, values in metrics.items():
        np.testing.assert_array_equal(values.precision, expected[task].precision)
        np.testing.assert_array_equal(values.stats(), expected[task].stats())
    assert (large, found) == before
    perfect = [
        {"score": 0.9, **{k: item[k] for k in ("image_id", "category_id", "bbox")}}
        for item in large["annotations"]
        if not item["iscrowd"]
    ]
    alone = {**large, "annotations": [a for a in large["annotations"] if not a["iscrowd"]]}
    assert coco_metrics(alone, perfect, ["bbox"], library=library)["bbox"].stats()[0] > 0.99


@pytest.mark.parametrize("library", ["hotcoco", "pycocotools"])
def test_no_detection_is_an_ap_of_zero_where_there_is_something_to_find(library):
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0, "id": 1}
    truth = {
        "images": [{"id": 1, "width": 20, "height": 20}],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "unseen"}],
        "annotations": [box],
    }
    metrics = coco_metrics(truth, [], ["bbox"], library=library)["bbox"]
    values = metrics.percentages()
    assert (values["AP"], values["AP50"], values["APs"]) == (0, 0, 0)
    assert np.isnan(values["APl"])
    np.testing.assert_equal(metrics.per_category(), [0, np.nan])


def test_the_mean_of_three_detections_is_the_one_on_paper():
    """A hit, a false one, a hit: precision 1 to recall 1/2, then 2/3."""
    boxes = [[0, 0, 40, 40], [100, 100, 40, 40]]
    truth = {
        "images": [{"id": 5, "width": 200, "height": 200}],
        "categories": [{"id": 3, "name": "cup"}],
        "annotations": [
            {"id": k + 1, "image_id": 5, "category_id": 3, "bbox": box, "area": 1600, "iscrowd": 0}
            for k, box in enumerate(boxes)
        ],
    }
    found = [(boxes[0], 0.9), ([60, 0, 9, 9], 0.8), (boxes[1], 0.7)]
    results = [
        {"image_id": 5, "category_id": 3, "bbox": box, "score": score} for box, score in found
    ]
    values = coco_metrics(truth, results, ["bbox"])["bbox"].percentages()
    expected = 100 * (51 * 1 + 50 * 2 / 3) / 101  # recalls 0, 0.01, ... 0.5, and those beyond
    assert values["AP"] == pytest.approx(expected)
    assert values["APm"] == 100  # a false detection of another size is not held against it


def lvis_case(seed):
    """(ground truth, results): in each image some classes are surely absent, some half done."""
    rng = np.random.default_rng(seed)
    truth, results = generate("bbox", images=30, detections=3000, classes=16, seed=seed)
    present = {}
    for item in truth["annotations"]:
        x, y, w, h = item["bbox"]
        item["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        del item["iscrowd"]
        present.setdefault(item["image_id"], set()).add(item["category_id"])
    for category in truth["categories"]:
        category["frequency"] = "rcf"[rng.integers(3)]
    keys = [category["id"] for category in truth["categories"]]
    for image in truth["images"]:
        here = sorted(present.get(image["id"], ()))
        image["neg_category_ids"] = [k for k in keys if k not in here and rng.random() < 0.3]
        image["not_exhaustive_category_ids"] = [k for k in here if rng.random() < 0.3]
    for result in results:
        result["score"] = round(result["score"], 1 + seed)
    return truth, results


@pytest.mark.parametrize(("seed", "task"), [(0, "bbox"), (1, "segm")])
def test_lvis_metrics_are_those_of_the_lvis_package(tmp_path, monkeypatch, seed, task):
    lvis = pytest.importorskip("lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # gone since numpy 1.24, used by lvis
    truth, results = lvis_case(seed)
    if task == "segm":
        for result in results:
            x, y, w, h = result.pop("bbox")
            ring = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            code = coco_mask.merge(coco_mask.frPyObjects(ring, 480, 640))
            result["segmentation"] = {"size": [480, 640], "counts": code["counts"].decode()}
    (tmp_path / "lvis.json").write_text(json.dumps(truth))
    dataset = lvis.LVIS(str(tmp_path / "lvis.json"))
    evaluation = lvis.LVISEval(dataset, lvis.LVISResults(dataset, copy.deepcopy(results)), task)
    evaluation.run()
    expected = evaluation.get_results()
    names = [category["name"] for category in truth["categories"]]
    ours = lvis_metrics(hotcoco.LVIS(str(tmp_path / "lvis.json")), results, task, names)
    shared = [name for name in ours if name in expected]
    assert {"AP", "APs", "APr", "APc", "APf"} < set(shared)
    assert {name: ours[name] for name in shared} == {name: expected[name] * 100 for name in shared}
    assert ours["AP"] > 1


def test_what_does_not_fit_together_is_named():
    truth, results = random_case(3)
    with pytest.raises(UserError, match="image 999 of the detections"):
        coco_metrics(truth, [{**results[0], "image_id": 999}], ["bbox"])
    bare = [{k: v for k, v in r.items() if k != "segmentation"} for r in results]
    with pytest.raises(UserError, match="no 'segmentation', which the metrics of 'segm' need"):
        coco_metrics(truth, bare, ["segm"])


def test_without_hotcoco_pycocotools_takes_over(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    truth, results = random_case(7)
    assert coco_metrics(truth, results, ["bbox"])["bbox"].library == "pycocotools"
    with pytest.raises(UserError, match=r"pip install 'moco-det\[fast-eval\]'"):
        coco_metrics(truth, results, ["bbox"], library="hotcoco")
