"""LVIS's and Cityscapes' metrics, against their own packages and against cases done by hand."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from moco_common.errors import UserError
from moco_det.evaluation.build import build_evaluator
from moco_det.evaluation.cityscapes_evaluation import (
    LABELS,
    THRESHOLDS,
    VOID,
    CityscapesInstanceEvaluator,
    average_precision,
    count_overlaps,
)
from moco_det.evaluation.lvis_evaluation import LVISEvaluator

CLASSES = list(LABELS)
SHAPE = (60, 80)


def random_scene(rng):
    """An annotation with instances, groups, tiny instances and void; predictions near them."""
    annotated = np.full(SHAPE, 7, np.int64)
    annotated[:6] = 4
    masks, classes = [], []
    for number in range(7):
        label = int(rng.choice([24, 26, 33]))
        y, x = rng.integers(0, 40, 2)
        h, w = (5, 6) if number == 0 else rng.integers(12, 24, 2)  # the first one is tiny
        region = np.zeros(SHAPE, bool)
        region[y : y + h, x : x + w] = True
        annotated[region] = label if number == 1 else label * 1000 + number
        for _ in range(rng.integers(0, 3)):
            dy, dx = rng.integers(-3, 4, 2)
            masks.append(np.roll(region, (dy, dx), (0, 1)))
            classes.append([24, 26, 33].index(label))
    masks.append(np.zeros(SHAPE, bool))  # an empty mask is no prediction
    masks.append(np.add.outer(np.arange(60) < 9, np.zeros(80, bool)))  # mostly on void
    classes += [0, 1]
    return annotated, np.array(masks), np.array(classes), rng.random(len(masks)).round(2)


def scene_ap(scenes, label_index, threshold):
    overlaps = [count_overlaps(m, c, s, a, [24, 26, 33])[label_index] for a, m, c, s in scenes]
    return average_precision(overlaps, threshold)


def box(y0, x0, y1, x1):
    mask = np.zeros(SHAPE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def ap_of(annotated, masks, scores, threshold=0.5):
    masks = np.array(masks).reshape(-1, *SHAPE)
    classes = np.zeros(len(masks), int)
    found = count_overlaps(masks, classes, np.array(scores, float), annotated, [26])
    return average_precision(found, threshold)


def test_the_table_of_labels_is_cityscapes_own():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    assert {v: k for k, v in LABELS.items()} == {
        label.id: label.name for label in labels if label.hasInstances and not label.ignoreInEval
    }
    assert set(VOID) == {label.id for label in labels if label.ignoreInEval} - {-1}


def test_cases_of_the_cityscapes_metric_that_can_be_done_by_hand():
    annotated = np.full(SHAPE, 7, np.int64)
    annotated[10:30, 10:30] = 26001
    annotated[10:30, 50:70] = 26002
    right, other = box(10, 10, 30, 30), box(10, 50, 30, 70)
    nothing_there = box(40, 40, 55, 55)
    assert ap_of(annotated, [right, other], [0.9, 0.8]) == 1.0
    assert ap_of(annotated, [right], [0.9]) == 0.5
    assert ap_of(annotated, [], []) == 0.0
    assert math.isnan(ap_of(np.full(SHAPE, 7), [right], [0.9]))
    assert ap_of(annotated, [right, right, other], [0.9, 0.95, 0.8]) < 1  # found twice
    assert ap_of(annotated, [right, other, nothing_there], [0.9, 0.8, 0.99]) < 1
    # A wrong prediction on a group, on void or on a tiny instance does not count.
    for label in (26, 4):
        excused = annotated.copy()
        excused[nothing_there] = label
        assert ap_of(excused, [right, other, nothing_there], [0.9, 0.8, 0.99]) == 1.0
    tiny = annotated.copy()
    tiny[40:49, 40:49] = 26003
    assert ap_of(tiny, [right, other, box(40, 40, 49, 49)], [0.9, 0.8, 0.99]) == 1.0
    # IoU exactly at the threshold is no match: 200 of 400 pixels.
    assert ap_of(annotated, [box(10, 10, 20, 30), other], [0.9, 0.8]) < 0.5


def test_cityscapes_ap_is_that_of_its_own_script(tmp_path, monkeypatch):
    script = pytest.importorskip("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
    monkeypatch.chdir(tmp_path)  # the script writes its matches where it is started
    if not hasattr(np, "in1d"):  # the script knows numpy before 2.4 only
        monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    # It writes a file into the working folder, which fails on numpy 2's integers.
    monkeypatch.setattr(script, "writeDict2JSON", lambda content, path: None)
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng) for _ in range(6)]
    truths, texts = [], []
    for number, (annotated, masks, classes, scores) in enumerate(scenes):
        stem = f"ulm_{number:06d}_000019"
        truth = tmp_path / f"{stem}_gtFine_instanceIds.png"
        Image.fromarray(annotated.astype(np.uint16)).save(truth)
        lines = []
        for k, (mask, label, score) in enumerate(zip(masks, classes, scores, strict=True)):
            Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"{stem}_{k}.png")
            lines.append(f"{stem}_{k}.png {[24, 26, 33][label]} {score}")
        (tmp_path / f"{stem}_pred.txt").write_text("\n".join(lines) + "\n")
        truths.append(str(truth))
        texts.append(str(tmp_path / f"{stem}_pred.txt"))
    arguments = script.args
    settings = {"predictionPath": str(tmp_path), "quiet": True, "JSONOutput": False}
    settings |= {"gtInstancesFile": str(tmp_path / "gt.json"), "colorized": False}
    for key, value in settings.items():
        monkeypatch.setattr(arguments, key, value)
    classes = script.evaluateImgLists(texts, truths, arguments)["averages"]["classes"]
    for index, name in enumerate(("person", "car", "bicycle")):
        found = [scene_ap(scenes, index, t) for t in THRESHOLDS]
        assert np.mean(found) == pytest.approx(classes[name]["ap"], abs=1e-12)
        assert found[0] == pytest.approx(classes[name]["ap50%"], abs=1e-12)
        assert 0 < np.mean(found) < 1


@pytest.fixture
def catalog():
    """Names registered in a test leave the catalogs with it."""
    before = [dict(c.data) for c in (DatasetCatalog, MetadataCatalog)]
    yield DatasetCatalog, MetadataCatalog
    for c, data in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        c.data.clear()
        c.data.update(data)


def instances(masks, classes, scores, boxes=None):
    found = Instances(SHAPE)
    found.pred_masks = torch.as_tensor(np.array(masks).reshape(-1, *SHAPE))
    found.pred_classes = torch.as_tensor(np.array(classes, int))
    found.scores = torch.as_tensor(np.array(scores, float))
    found.pred_boxes = Boxes(torch.zeros(len(found), 4) if boxes is None else boxes)
    return {"instances": found}


def test_the_cityscapes_evaluator_averages_classes_and_counts_each_image_once(tmp_path, catalog):
    datasets, metadata = catalog
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng) for _ in range(3)]
    records = []
    for number, scene in enumerate(scenes):
        folder = tmp_path / "gt/ulm"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"ulm_{number:06d}_000019"
        Image.fromarray(scene[0].astype(np.uint16)).save(folder / f"{name}_gtFine_instanceIds.png")
        image = f"{name}_leftImg8bit.png"
        records.append({"file_name": f"/images/ulm/{image}", "image_id": image})
    datasets.register("cities", lambda: records)
    metadata.get("cities").set(
        gt_dir=str(tmp_path / "gt"), thing_classes=CLASSES, evaluator_type="cityscapes_instance"
    )
    evaluator = build_evaluator("cities", tasks=["segm"], output_dir=tmp_path / "out")
    assert isinstance(evaluator, CityscapesInstanceEvaluator)
    to_class = np.array([CLASSES.index(c) for c in ("person", "car", "bicycle")])
    for record, (_, masks, classes, scores) in [*zip(records, scenes, strict=True)] * 2:
        evaluator.process([record], [instances(masks, to_class[classes], scores)])
    found = evaluator.evaluate()["segm"]
    by_class = [[scene_ap(scenes, k, t) for t in THRESHOLDS] for k in range(3)]
    assert found["AP"] == pytest.approx(100 * np.mean(by_class))
    assert found["AP50"] == pytest.approx(100 * np.mean([ap[0] for ap in by_class]))
    assert found["AP-car"] == pytest.approx(100 * np.mean(by_class[1]))
    assert math.isnan(found["AP-train"])
    assert json.loads((tmp_path / "out/coco_instances_results.json").read_text())
    evaluator.reset()
    evaluator.process([records[0]], [instances(*scenes[0][1:])])
    with pytest.raises(UserError, match="2 of 3 images of cities were not evaluated"):
        evaluator.evaluate()


def lvis_problem(rng, images=25, classes=12):
    """LVIS's annotations and detections, some on images where a class was not judged."""
    content = {"info": {}, "licenses": [], "images": [], "annotations": [], "categories": []}
    found = []
    for image in range(1, images + 1):
        present = [int(c) for c in rng.choice(classes, 3, replace=False) + 1]
        absent = [c for c in range(1, classes + 1) if c not in present]
        content["images"].append(
            {"id": image, "width": 80, "height": 60, "neg_category_ids": absent[:3]}
            | {"not_exhaustive_category_ids": present[:1]}
        )
        boxes = [(c, rng.uniform(0, 30, 2), rng.uniform(10, 45, 2)) for c in present * 2]
        for label, (x, y), (w, h) in boxes:
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            item = {"id": len(content["annotations"]) + 1, "image_id": image, "area": w * h}
            item |= {"category_id": label, "bbox": [x, y, w, h], "segmentation": [corners]}
            content["annotations"].append(item)
            near = np.array([x, y, w, h]) + rng.normal(0, 1.5, 4)
            found.append((image, label, np.maximum(near, 1), round(float(rng.random()), 2)))
        for label in rng.integers(1, classes + 1, 6):
            found.append((image, int(label), rng.uniform(2, 28, 4), round(float(rng.random()), 2)))
    for label in range(1, classes + 1):
        category = {"id": label, "name": f"class {label}", "frequency": "rcf"[label % 3]}
        content["categories"].append(category | {"image_count": 5, "instance_count": 5})
    return content, found


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_lvis_metrics_are_those_of_the_lvis_package(task, tmp_path, catalog, monkeypatch):
    lvis = pytest.importorskip("lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # the package knows numpy before 1.24
    content, found = lvis_problem(np.random.default_rng(0))
    file = tmp_path / "lvis.json"
    file.write_text(json.dumps(content))
    datasets, metadata = catalog
    datasets.register("lvis_here", lambda: content["images"])
    names = [category["name"] for category in content["categories"]]
    metadata.get("lvis_here").set(json_file=str(file), thing_classes=names, evaluator_type="lvis")
    evaluator = build_evaluator("lvis_here", tasks=[task], output_dir=tmp_path / "out")
    assert isinstance(evaluator, LVISEvaluator)
    for image in content["images"]:
        mine = [f for f in found if f[0] == image["id"]]
        boxes = torch.as_tensor(np.array([f[2] for f in mine]))
        boxes[:, 2:] += boxes[:, :2]
        masks = np.zeros((len(mine), *SHAPE), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        output = instances(masks, [f[1] - 1 for f in mine], [f[3] for f in mine], boxes)
        evaluator.process([{"image_id": image["id"]}], [output])
    ours = evaluator.evaluate()[task]
    results = json.loads((tmp_path / "out/coco_instances_results.json").read_text())
    assert [(r["image_id"], r["category_id"]) for r in results] == [f[:2] for f in found]
    if task == "segm":
        results = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    truth = lvis.LVIS(str(file))
    oracle = lvis.LVISEval(truth, lvis.LVISResults(truth, results, max_dets=300), task)
    oracle.run()
    theirs = oracle.get_results()
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APr", "APc", "APf"):
        assert ours[name] == 100 * theirs[name]
    assert math.isnan(ours["APl"])
    assert theirs["APl"] == -1  # no object of that size
    precision = oracle.eval["precision"][:, :, 4, 0]
    assert ours["AP-class 5"] == pytest.approx(100 * precision[precision > -1].mean())
    assert 0 < ours["AP"] < 100


def test_lvis_ids_of_any_size_change_nothing(tmp_path, catalog):
    pytest.importorskip("hotcoco")
    content, found = lvis_problem(np.random.default_rng(1))
    datasets, metadata = catalog
    results = []
    for name, offset in (("small", 0), ("large", 2**63)):
        images = [{**image, "id": image["id"] + offset} for image in content["images"]]
        objects = [{**a, "image_id": a["image_id"] + offset} for a in content["annotations"]]
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({**content, "images": images, "annotations": objects}))
        datasets.register(f"lvis_{name}", lambda: None)
        names = [category["name"] for category in content["categories"]]
        metadata.get(f"lvis_{name}").set(
            json_file=str(file), thing_classes=names, evaluator_type="lvis"
        )
        evaluator = build_evaluator(f"lvis_{name}", tasks=["bbox"], output_dir=tmp_path / name)
        for image in images:
            mine = [f for f in found if f[0] + offset == image["id"]]
            boxes = torch.as_tensor(np.array([f[2] for f in mine]))
            boxes[:, 2:] += boxes[:, :2]
            masks = np.zeros((len(mine), *SHAPE), bool)
            output = instances(masks, [f[1] - 1 for f in mine], [f[3] for f in mine], boxes)
            evaluator.process([{"image_id": image["id"]}], [output])
        results.append(evaluator.evaluate()["bbox"])
    assert 0 < results[0]["AP"] < 100
    np.testing.assert_equal(results[1], results[0])


def test_without_hotcoco_lvis_is_refused_with_the_extra(monkeypatch, catalog):
    datasets, metadata = catalog
    datasets.register("lvis_there", list)
    metadata.get("lvis_there").set(evaluator_type="lvis")
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'moco-det\[fast-eval\]'"):
        build_evaluator("lvis_there", tasks=["bbox"], output_dir=".")
