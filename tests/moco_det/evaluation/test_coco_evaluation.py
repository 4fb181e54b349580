"""COCO evaluation of own data against pycocotools on the file itself; two processes against one."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import moco_det  # noqa: F401
from moco_common.errors import UserError
from moco_det.data.register import register
from moco_det.evaluation.build import build_evaluator
from moco_det.report.error_analysis import analyse_run
from moco_det.report.predictions_io import open_dataset
from tests.moco_det.ranks import on_ranks

CATEGORIES = [{"id": 7, "name": "cup"}, {"id": 90, "name": "plate"}, {"id": 91, "name": "unseen"}]
SIDE = 64


def ellipse(box):
    """A filled ellipse in a box, as (SIDE, SIDE) uint8."""
    x0, y0, x1, y1 = box
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    radius = ((x - (x0 + x1) / 2) / (x1 - x0)) ** 2 + ((y - (y0 + y1) / 2) / (y1 - y0)) ** 2
    return (radius <= 0.25).astype(np.uint8)


def rle(pixels):
    encoded = coco_mask.encode(np.asfortranarray(pixels))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def write_coco(folder, masks=True, images=24, seed=0):
    """A COCO file with sparse ids, a crowd and an empty image. Returns its spec."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": CATEGORIES}
    for image_id in rng.permutation(1000)[:images].tolist():
        name = f"{image_id}.png"
        Image.new("L", (SIDE, SIDE)).save(folder / "images" / name)
        content["images"].append({"id": image_id, "file_name": name, "width": SIDE, "height": SIDE})
        for _ in range(0 if len(content["images"]) == 2 else rng.integers(1, 5)):
            x, y = rng.integers(0, 30, 2).tolist()
            w, h = rng.integers(6, 33, 2).tolist()
            pixels = ellipse((x, y, x + w, y + h))
            annotation = {
                "id": len(content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": int(rng.choice([7, 90])),
                "bbox": [x, y, w, h],
                "area": int(pixels.sum()),
                "iscrowd": int(rng.random() < 0.1),
            }
            if masks:
                annotation["segmentation"] = rle(pixels)
            content["annotations"].append(annotation)
    (folder / "own.json").write_text(json.dumps(content))
    return f"coco:{folder / 'own.json'}:{folder / 'images'}"


def predict(record, masks=True):
    """A made-up detector: jittered objects and noise, the same for the same image."""
    rng = np.random.default_rng(record["image_id"])
    boxes = [item["bbox"] for item in record["annotations"]] * 2 + [[3, 3, 20, 20]]
    labels = [item["category_id"] for item in record["annotations"]] * 2 + [1]
    boxes = np.clip(np.array(boxes) + rng.normal(0, 1.0, (len(boxes), 4)), 0, SIDE)
    instances = Instances((SIDE, SIDE))
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    instances.scores = torch.from_numpy(rng.random(len(boxes)).round(2).astype(np.float32))
    instances.pred_classes = torch.tensor(labels)
    if masks:
        instances.pred_masks = torch.from_numpy(np.stack([ellipse(box) for box in boxes])) > 0
    return {"image_id": record["image_id"]}, {"instances": instances}


def run(evaluator, pairs):
    evaluator.reset()
    for inputs, outputs in pairs:
        evaluator.process([inputs], [outputs])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()


def pycocotools_stats(json_file, results_file, task, sigmas=None):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(json_file)
        results = json.loads(Path(results_file).read_text())
        if task == "segm":
            for result in results:
                del result["bbox"]
        evaluation = COCOeval(truth, truth.loadRes(results), task)
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) * 100 if value >= 0 else float("nan") for value in evaluation.stats[:6]]


def test_own_data_give_the_statistics_of_pycocotools_on_the_file(tmp_path):
    name = register(write_coco(tmp_path))
    pairs = [predict(record) for record in DatasetCatalog.get(name)]
    results = run(build_evaluator(name, output_dir=tmp_path / "out"), pairs)
    assert set(results) == {"bbox", "segm"}
    for task, metrics in results.items():
        file = tmp_path / "out/coco_instances_results.json"
        expected = pycocotools_stats(tmp_path / "own.json", file, task)
        keys = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        np.testing.assert_array_equal([metrics[key] for key in keys], expected)
        assert 20 < metrics["AP"] < 95
        assert np.isnan(metrics["AP-unseen"])


@pytest.mark.parametrize("base", [2**53, 2**64, 3**90])
def test_ids_beyond_float64_change_neither_the_results_nor_the_report(tmp_path, base):
    spec = write_coco(tmp_path / "plain")
    content = json.loads((tmp_path / "plain/own.json").read_text())
    for part, keys in (
        ("images", ["id"]),
        ("categories", ["id"]),
        ("annotations", ["image_id", "category_id"]),
    ):
        for item in content[part]:
            item |= {key: item[key] + base for key in keys}
    (tmp_path / "plain/large.json").write_text(json.dumps(content))
    results, analyses = [], []
    for data, shift in ((spec, 0), (spec.replace("own.json", "large.json"), base)):
        name = register(data)
        plain = [{**r, "image_id": r["image_id"] - shift} for r in DatasetCatalog.get(name)]
        pairs = [({"image_id": i["image_id"] + shift}, o) for i, o in map(predict, plain)]
        run_dir = tmp_path / str(shift)
        evaluator = build_evaluator(name, output_dir=run_dir / "inference")
        results.append(run(evaluator, pairs))
        analyses.append(analyse_run(run_dir, open_dataset(data)))
    assert json.dumps(results[0]) == json.dumps(results[1])
    assert results[0]["bbox"]["AP"] > 20
    first, second = analyses
    np.testing.assert_array_equal(first.confusion, second.confusion)
    np.testing.assert_array_equal(first.precision, second.precision)
    assert json.dumps(first.sizes) == json.dumps(second.sizes)


def test_a_class_without_objects_is_named_and_not_in_the_mean(tmp_path, caplog):
    spec = write_coco(tmp_path)
    trained = ["absent", *MetadataCatalog.get(register(spec)).thing_classes]
    records = DatasetCatalog.get(register(spec, classes=trained))
    pairs = [predict(record) for record in records]
    results = run(build_evaluator(spec, output_dir=tmp_path / "out", tasks=["bbox"]), pairs)
    assert f"warning: {spec} has no object of absent, unseen: not in the mean AP" in caplog.messages
    assert np.isnan(results["bbox"]["AP-absent"])
    there = [results["bbox"][f"AP-{name}"] for name in trained[1:]]
    assert results["bbox"]["AP"] == pytest.approx(np.nanmean(there))


def test_data_without_masks_are_evaluated_for_boxes_whatever_the_model_predicts(tmp_path):
    name = register(write_coco(tmp_path, masks=False))
    assert not MetadataCatalog.get(name).has_masks
    pairs = [predict(record) for record in DatasetCatalog.get(name)]
    assert set(run(build_evaluator(name, output_dir=tmp_path / "out"), pairs)) == {"bbox"}
    with pytest.raises(UserError, match="no masks"):
        build_evaluator(name, output_dir=tmp_path, tasks=["bbox", "segm"])


def test_changed_data_in_the_same_folder_are_evaluated_as_they_are_now(tmp_path):
    spec = write_coco(tmp_path)
    name = register(spec)
    pairs = [predict(record) for record in DatasetCatalog.get(name)]
    before = run(build_evaluator(name, output_dir=tmp_path / "out"), pairs)
    content = json.loads((tmp_path / "own.json").read_text())
    content["annotations"] = content["annotations"][::2]
    (tmp_path / "own.json").write_text(json.dumps(content))
    assert register(spec) == name
    after = run(build_evaluator(name, output_dir=tmp_path / "out"), pairs)
    file = tmp_path / "out/coco_instances_results.json"
    assert after["bbox"]["AP"] == pycocotools_stats(tmp_path / "own.json", file, "bbox")[0]
    assert after["bbox"]["AP"] != before["bbox"]["AP"]


def test_no_detection_at_all_is_an_ap_of_zero(tmp_path):
    name = register(write_coco(tmp_path))
    pairs = []
    for record in DatasetCatalog.get(name):
        inputs, outputs = predict(record)
        pairs.append((inputs, {"instances": outputs["instances"][:0]}))
    metrics = run(build_evaluator(name, output_dir=tmp_path / "out"), pairs)["bbox"]
    assert (metrics["AP"], metrics["AP50"], metrics["AP75"]) == (0, 0, 0)
    assert metrics["APs"] == 0
    assert np.isnan(metrics["APl"])  # no object is that large


def test_a_repeated_image_counts_once_and_a_lost_or_foreign_one_is_an_error(tmp_path, caplog):
    name = register(write_coco(tmp_path))
    pairs = [predict(record) for record in DatasetCatalog.get(name)]
    evaluator = build_evaluator(name, output_dir=tmp_path / "out")
    expected = run(evaluator, pairs)
    np.testing.assert_equal(run(evaluator, [*pairs[::-1], pairs[0], pairs[5]]), expected)
    assert "2 images of" in caplog.text
    with pytest.raises(UserError, match="1 of 24 images .* were not evaluated"):
        run(evaluator, pairs[1:])
    with pytest.raises(UserError, match="image 5000 is not of"):
        run(evaluator, [*pairs, ({"image_id": 5000}, pairs[0][1])])
    pairs[3][1]["instances"].pred_classes[0] = 3
    with pytest.raises(UserError, match="predicts class 3, but .* has 3 classes"):
        run(evaluator, pairs)


def test_ap_by_class_does_not_depend_on_the_order_of_the_classes(tmp_path):
    """A test set in the order of its training classes, which is not that of the file's ids."""
    spec = write_coco(tmp_path)
    in_file = ["cup", "plate", "unseen"]
    order = ["plate", "unseen", "cup"]
    results = {}
    for key, classes in {"file": None, "training": order}.items():
        name = register(spec, classes)
        pairs = [predict(record) for record in DatasetCatalog.get(name)]
        for _, output in pairs:
            if classes:  # the same detections of a model with the classes in another order
                last = output["instances"].pred_classes[-1:]
                last[:] = order.index(in_file[1])
        results[key] = run(build_evaluator(name, output_dir=tmp_path / key), pairs)
    np.testing.assert_equal(results["training"], results["file"])
    assert results["file"]["bbox"]["AP-cup"] != results["file"]["bbox"]["AP-plate"]


def test_chosen_images_are_evaluated_alone(tmp_path):
    name = register(write_coco(tmp_path))
    chosen = [record["image_id"] for record in DatasetCatalog.get(name)][::2]
    pairs = [predict(r) for r in DatasetCatalog.get(name) if r["image_id"] in chosen]
    evaluator = build_evaluator(name, output_dir=tmp_path / "out")
    evaluator.reset()
    for inputs, outputs in pairs:
        evaluator.process([inputs], [outputs])
    content = json.loads((tmp_path / "own.json").read_text())
    content["images"] = [i for i in content["images"] if i["id"] in chosen]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    (tmp_path / "half.json").write_text(json.dumps(content))
    alone = register(f"coco:{tmp_path / 'half.json'}:{tmp_path / 'images'}")
    expected = run(build_evaluator(alone, output_dir=tmp_path / "half"), pairs)
    np.testing.assert_equal(evaluator.evaluate(chosen), expected)


@pytest.mark.parametrize("names", [("nose", "tail"), COCO_PERSON_KEYPOINT_NAMES])
def test_keypoints_are_evaluated_as_pycocotools_does(tmp_path, names):
    """Objects without keypoints do not count; COCO's sigmas for COCO's names, one for others."""
    rng = np.random.default_rng(len(names))
    write_coco(tmp_path, masks=False)
    content = json.loads((tmp_path / "own.json").read_text())
    content["categories"] = [{"id": 1, "name": "person", "keypoints": list(names)}]
    for item in content["annotations"]:
        item |= {"category_id": 1, "bbox": [2 * v for v in item["bbox"]], "area": 4 * item["area"]}
        x, y, w, h = item["bbox"]
        points = np.concatenate(
            [[x, y] + rng.random((len(names), 2)) * [w, h], rng.integers(0, 3, (len(names), 1))],
            axis=1,
        ).astype(int)
        points[points[:, 2] == 0] = 0
        if rng.random() < 0.2:
            points[:] = 0
        item |= {
            "keypoints": points.ravel().tolist(),
            "num_keypoints": int((points[:, 2] > 0).sum()),
        }
    for image in content["images"]:
        image |= {"width": 2 * SIDE, "height": 2 * SIDE}
        Image.new("L", (2 * SIDE, 2 * SIDE)).save(tmp_path / "images" / image["file_name"])
    (tmp_path / "own.json").write_text(json.dumps(content))
    name = register(f"coco:{tmp_path / 'own.json'}:{tmp_path / 'images'}")
    pairs = []
    for record in DatasetCatalog.get(name):
        inputs, outputs = predict({**record, "annotations": record["annotations"]}, masks=False)
        instances = outputs["instances"]
        instances.pred_classes[:] = 0
        true = [np.reshape(a["keypoints"], (-1, 3)) for a in record["annotations"]] * 2
        true.append(np.full((len(names), 3), 9.0))
        points = np.stack(true) + rng.normal(0, 2, (len(true), len(names), 3)) * [1, 1, 0]
        instances.pred_keypoints = torch.tensor(points, dtype=torch.float32)
        pairs.append((inputs, outputs))
    evaluator = build_evaluator(name, output_dir=tmp_path / "out")
    results = run(evaluator, pairs)
    np.testing.assert_equal(run(evaluator, pairs), results)  # predictions are not shifted twice
    sigmas = None if len(names) == 17 else [0.07] * len(names)
    file = tmp_path / "out/coco_instances_results.json"
    expected = pycocotools_stats(tmp_path / "own.json", file, "keypoints", sigmas)[:5]
    assert list(results) == ["bbox", "keypoints"]
    keys = ("AP", "AP50", "AP75", "APm", "APl")
    np.testing.assert_array_equal([results["keypoints"][key] for key in keys], expected)
    assert 10 < results["keypoints"]["AP"] < 95


def shares_of(records, world_size):
    """Each rank's records as a sampler deals them that fills up with the first ones again."""
    size = -(-len(records) // world_size)
    padded = (records * 2)[: size * world_size]
    return [padded[rank::world_size] for rank in range(world_size)]


def evaluate_on_rank(rank, folder, world_size):
    """Both evaluators on one rank's share of the images, as plain values."""
    results = {}
    for spec in (f"coco:{folder / 'own.json'}:{folder / 'images'}", f"voc:{folder / 'voc'}:all"):
        name = register(spec)
        evaluator = build_evaluator(name, output_dir=folder / f"out_{world_size}")
        pairs = []
        for record in shares_of(DatasetCatalog.get(name), world_size)[rank]:
            inputs, outputs = predict({**record, "image_id": int(record["image_id"])})
            pairs.append(({"image_id": record["image_id"]}, outputs))
        results[spec] = run(evaluator, pairs)
    return json.loads(json.dumps(results))


def write_voc_twin(folder):
    """The boxes of the COCO file in VOC layout."""
    content = json.loads((folder / "own.json").read_text())
    (folder / "voc/Annotations").mkdir(parents=True)
    (folder / "voc/JPEGImages").symlink_to(folder / "images")
    names = {entry["id"]: entry["name"] for entry in CATEGORIES}
    for image in content["images"]:
        objects = ""
        for item in content["annotations"]:
            if item["image_id"] == image["id"]:
                x, y, w, h = item["bbox"]
                corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
                box = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
                objects += (
                    f"<object><name>{names[item['category_id']]}</name>"
                    f"<difficult>{item['iscrowd']}</difficult><bndbox>{box}</bndbox></object>"
                )
        text = f"<a><size><width>{SIDE}</width><height>{SIDE}</height></size>{objects}</a>"
        (folder / f"voc/Annotations/{image['id']}.xml").write_text(text)


def test_three_ranks_over_seven_images_evaluate_as_one(tmp_path):
    """Shares that alternate and are filled up: two images are seen twice, and count once."""
    write_coco(tmp_path, images=7)
    write_voc_twin(tmp_path)
    (alone,) = on_ranks(1, evaluate_on_rank, tmp_path, 1)
    gathered, *others = on_ranks(3, evaluate_on_rank, tmp_path, 3)
    assert [list(results) for results in gathered.values()] == [["bbox", "segm"], ["bbox"]]
    for spec, tasks in alone.items():
        for task, metrics in tasks.items():
            assert metrics["AP"] > 10
            np.testing.assert_equal(gathered[spec][task], metrics)
    for results in others:
        assert list(results.values()) == [{}, {}]
    for file in (tmp_path / "out_1").iterdir():  # the predictions too, to the byte
        assert file.read_bytes() == (tmp_path / "out_3" / file.name).read_bytes()
