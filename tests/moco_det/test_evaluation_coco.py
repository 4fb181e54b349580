"""COCO evaluation of own data against pycocotools on the file itself; two processes against one."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import moco_det  # noqa: F401

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from moco_det.datasets import register
from moco_det.errors import UserError
from moco_det.evaluation import build_evaluator

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


def pycocotools_stats(json_file, results_file, task):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(json_file)
        results = json.loads(Path(results_file).read_text())
        if task == "segm":
            for result in results:
                del result["bbox"]
        evaluation = COCOeval(truth, truth.loadRes(results), task)
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


def test_a_repeated_and_a_lost_image_are_errors(tmp_path):
    name = register(write_coco(tmp_path))
    pairs = [predict(record) for record in DatasetCatalog.get(name)]
    evaluator = build_evaluator(name, output_dir=tmp_path / "out")
    with pytest.raises(UserError, match="more than once"):
        run(evaluator, [*pairs, pairs[0]])
    with pytest.raises(UserError, match="1 of 24 images .* were not evaluated"):
        run(evaluator, pairs[1:])


def evaluate_share(folder, rank, world_size):
    """Both evaluators on every ``world_size``-th image from ``rank`` on."""
    results = {}
    for spec in (f"coco:{folder / 'own.json'}:{folder / 'images'}", f"voc:{folder / 'voc'}:all"):
        name = register(spec)
        evaluator = build_evaluator(name, output_dir=folder / f"out_{world_size}")
        records = DatasetCatalog.get(name)[rank::world_size]
        pairs = []
        for record in records:
            inputs, outputs = predict({**record, "image_id": int(record["image_id"])})
            pairs.append(({"image_id": record["image_id"]}, outputs))
        results[spec] = run(evaluator, pairs)
    return results


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


def test_two_processes_evaluate_as_one(tmp_path):
    """Shares that alternate: the order among equal scores must not depend on them."""
    write_coco(tmp_path)
    write_voc_twin(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(tmp_path), str(rank), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    alone = json.loads(json.dumps(evaluate_share(tmp_path, 0, 1)))  # while they start
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    gathered = json.loads(outputs[0].splitlines()[-1])
    assert [list(results) for results in gathered.values()] == [["bbox", "segm"], ["bbox"]]
    for spec, tasks in alone.items():
        for task, metrics in tasks.items():
            assert metrics["AP"] > 10
            np.testing.assert_equal(gathered[spec][task], metrics)
    assert list(json.loads(outputs[1].splitlines()[-1]).values()) == [{}, {}]


if __name__ == "__main__":
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{sys.argv[3]}", rank=int(sys.argv[2]), world_size=2
    )
    shared = evaluate_share(Path(sys.argv[1]), comm.get_rank(), comm.get_world_size())
    print(json.dumps(shared))
