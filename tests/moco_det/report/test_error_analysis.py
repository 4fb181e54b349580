"""What lies behind an AP, against naive loops, conservation of counts and pycocotools."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from moco_common.errors import UserError
from moco_det.report.analyse import Analysis
from moco_det.report.build import build_report
from moco_det.report.error_analysis import (
    analyse_run,
    assign,
    choose_images,
    count_confusions,
    match,
)
from moco_det.report.example_images import any_masks
from moco_det.report.predictions_io import annotated_objects, open_dataset
from moco_det.report.runs import read_runs
from moco_det.report.sections import details, deviations
from moco_det.structures.objects import Objects
from tests.moco_det.report_cases import (
    CLASSES,
    two_groups,
    write_coco,
    write_predictions,
    write_run,
)
from tools.report import main


def random_objects(rng, count, scored):
    low = rng.uniform(0, 40, (count, 2))
    boxes = np.hstack([low, low + rng.uniform(8, 30, (count, 2))])
    scores = rng.random(count).round(1) if scored else None
    ignored = None if scored else rng.random(count) < 0.2
    return Objects(boxes, rng.integers(0, 3, count), scores, ignored=ignored)


def test_every_object_and_every_detection_is_counted_once():
    """Rows add up to the annotated objects, columns to the detections that count."""
    rng = np.random.default_rng(0)
    off_diagonal = 0
    for _ in range(60):
        detections, truth = random_objects(rng, 7, True), random_objects(rng, 6, False)
        taken = assign(detections, truth)
        np.testing.assert_array_equal(taken >= 0, match(detections, truth))
        matrix = np.zeros((4, 4), dtype=np.int64)
        f1 = count_confusions(matrix, detections, truth, taken)
        wanted = truth.classes[~truth.ignored]
        counts = [t < 0 or not truth.ignored[t] for t in taken]
        shown = detections.classes[counts]
        np.testing.assert_array_equal(matrix[:3].sum(axis=1), np.bincount(wanted, minlength=3))
        np.testing.assert_array_equal(matrix[:, :3].sum(axis=0), np.bincount(shown, minlength=3))
        hits = np.trace(matrix[:3, :3])
        assert matrix[3, 3] == 0
        assert f1 == pytest.approx(2 * hits / (len(wanted) + len(shown)))
        off_diagonal += matrix[:3, :3].sum() - hits
    assert off_diagonal > 10


def test_a_confusion_is_a_detection_on_an_object_of_another_class():
    truth = Objects(np.array([[0, 0, 10, 10], [20, 20, 40, 40.0]]), np.array([0, 1]))
    found = Objects(
        np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 40, 40], [70, 70, 80, 80.0]]),
        np.array([1, 0, 1, 0]),
        np.array([0.9, 0.8, 0.7, 0.6]),
    )
    matrix = np.zeros((3, 3), dtype=np.int64)
    # The right class takes its object although another was surer, which then finds nothing free.
    assert count_confusions(matrix, found, truth, assign(found, truth)) == 4 / 6
    assert matrix.tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 0]]
    matrix[:] = 0
    alone = found.select(np.array([0]))
    count_confusions(matrix, alone, truth, assign(alone, truth))
    assert matrix.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]


def test_an_image_with_nothing_in_it_has_no_f1():
    nothing = Objects(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    matrix = np.zeros((2, 2), dtype=np.int64)
    assert count_confusions(matrix, nothing, nothing, assign(nothing, nothing)) is None
    crowd = Objects(np.array([[0, 0, 9, 9.0]]), np.array([0]), ignored=np.array([True]))
    found = Objects(np.array([[0, 0, 9, 9.0]]), np.array([0]), np.array([0.5]))
    assert count_confusions(matrix, found, crowd, assign(found, crowd)) is None
    assert not matrix.any()


def test_curves_and_sizes_are_those_of_pycocotools(tmp_path):
    spec = write_coco(tmp_path / "data")
    run = write_run(tmp_path / "run", dataset=spec)
    results = write_predictions(run, spec, 0.8)
    # Classes in another order than the file's ids, as a run's own config may state them.
    found = analyse_run(run, open_dataset(spec, CLASSES[::-1]))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "data" / "own.json"))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = evaluation.eval["precision"][[0, 5], :, :, 0, -1]  # categories 4 and 9: cat, dog
    np.testing.assert_array_equal(found.precision, expected[:, :, ::-1])
    expected = [100 * value if value >= 0 else np.nan for value in evaluation.stats[3:6]]
    np.testing.assert_array_equal(list(found.sizes.values()), expected)
    assert found.confusion[:2].sum() == sum(not a["iscrowd"] for a in truth.dataset["annotations"])


@pytest.mark.parametrize("masks", [True, False])
def test_an_object_whose_mask_is_odd_counts_in_the_report_on_boxes_alone(tmp_path, masks):
    spec = write_coco(tmp_path / "data")
    run = write_run(tmp_path / "run", dataset=spec)
    file = tmp_path / "data" / "own.json"
    content = json.loads(file.read_text())
    for item in content["annotations"]:
        item["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    content["annotations"][0]["segmentation"] = "odd"
    file.write_text(json.dumps(content))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["MODEL"]["MASK_ON"] = masks
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert any_masks([run]) == masks
    dataset = open_dataset(spec, masks=any_masks([run]))
    found = sum(len(record["annotations"]) for record in dataset.records)
    assert found == len(content["annotations"]) - masks


def test_f1_of_an_image_is_the_one_of_its_shown_detections(tmp_path):
    spec = write_coco(tmp_path / "data")
    run = write_run(tmp_path / "run", dataset=spec)
    results = write_predictions(run, spec, 0.7)
    dataset = open_dataset(spec)
    found = analyse_run(run, dataset)
    for record, value in zip(dataset.records, found.f1, strict=True):
        shown = [r for r in results if r["image_id"] == record["image_id"]]
        shown = [r for r in shown if r["score"] >= found.threshold]
        truth = annotated_objects(record)
        if truth.ignored.any():
            continue
        predictions = {str(record["image_id"]): shown}
        hits = match(dataset.detections(record, predictions), truth).sum()
        total = len(shown) + len(truth)
        expected = 2 * hits / total if total else np.nan
        np.testing.assert_allclose(value, expected)


def test_best_worst_and_most_different_images_are_apart():
    first = np.array([0.9, 0.1, 0.5, 0.2, np.nan, 0.95, 0.0])
    second = np.array([0.8, 0.9, 0.5, 0.1, 0.7, 0.9, 0.1])
    chosen = {k: v.tolist() for k, v in choose_images([first, second], 2).items()}
    assert chosen == {"best": [5, 0], "worst": [6, 2], "most different": [1, 3]}
    alone = {k: v.tolist() for k, v in choose_images([first], 1).items()}
    assert alone == {"best": [5], "worst": [6]}
    few = choose_images([first[:2], second[:2]], 4)  # each image once, however few there are
    assert sorted(np.concatenate(list(few.values()))) == [0, 1]


def test_the_report_holds_what_the_predictions_show(tmp_path):
    runs = read_runs(two_groups(tmp_path / "runs", predictions=True))
    report = build_report(runs, tmp_path / "out", num_images=1)
    report.write(tmp_path / "out")
    (table,) = report.tables
    analysis = table.analysis
    shown = {detail.title: detail for detail in details(table)}
    assert list(shown) == [
        "By object size", "Box AP by class",
        "Confusion of classes: moco", "Confusion of classes: random",
    ]  # fmt: skip
    matrix = shown["Confusion of classes: moco"]
    assert f"summed over {len(analysis.runs['moco'])} runs;" in matrix.note
    assert [row[0] for row in matrix.rows] == [*CLASSES, "(background)"]
    values = json.loads((tmp_path / "out" / "report.json").read_text())["tables"][0]["analysis"]
    runs = analysis.runs["moco"]
    assert values["groups"]["moco"]["confusion"] == sum(run.confusion for run in runs).tolist()
    assert [len(c) for c in values["groups"]["random"]["precision_at_iou_50"].values()] == [101] * 2
    assert set(values["images"]) == {"best", "worst", "most different"}
    assert all(path.is_file() for path in analysis.figures.values())
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "### Confusion of classes: random" in text
    assert report.notes == []
    alone = replace(table, analysis=replace(analysis, runs={"moco": runs[:1]}))
    assert "summed over 1 run; rows" in details(alone)[-1].note


@pytest.mark.parametrize("name", ["report.json", "worst-0.jpg"])
def test_the_report_replaces_neither_the_annotations_nor_an_image(tmp_path, capsys, name):
    paths = two_groups(tmp_path / "runs", predictions=True)
    data = tmp_path / "data"
    annotations = data / "own.json"
    if name == "report.json":
        annotations = annotations.rename(data / name)
        out = data
    else:
        out = data / "images"
        (out / "1.jpg").rename(out / name)
        annotations.write_text(annotations.read_text().replace('"1.jpg"', f'"{name}"'))
    before = (out / name).read_bytes()
    for path in paths:
        results = json.loads((path / "results.json").read_text())
        results["dataset"] = f"coco:{annotations}:{data / 'images'}"
        (path / "results.json").write_text(json.dumps(results))
    main([*map(str, paths), "-o", str(out)])
    assert f"{name} is an input" in "".join(capsys.readouterr())
    assert (out / name).read_bytes() == before


def test_many_classes_are_listed_by_their_confusions(tmp_path):
    runs = read_runs(two_groups(tmp_path / "runs", predictions=True))
    report = build_report(runs, tmp_path / "out", num_images=0)
    (table,) = report.tables
    assert list(table.analysis.figures) == ["Precision over recall"]
    run = table.analysis.runs["moco"][0]
    matrix = np.zeros((31, 31), dtype=np.int64)
    matrix[3, [3, 5, 30]] = [10, 7, 3]
    matrix[8, 2] = 9
    matrix[30, 4] = 50
    names = [f"class {index}" for index in range(30)]
    many = Analysis(names, {"moco": [replace(run, confusion=matrix)]})
    rows = details(replace(table, analysis=many))[-1].rows
    assert rows == [["class 8", "class 2", "9", "100.0 %"], ["class 3", "class 5", "7", "35.0 %"]]


def test_data_that_are_gone_or_others_are_named_and_the_rest_is_reported(tmp_path):
    paths = two_groups(tmp_path / "runs", predictions=True)
    results = [{"image_id": 77, "category_id": 4, "bbox": [1, 1, 5, 5], "score": 0.5}]
    for path in paths:
        (path / "inference" / "coco_instances_results.json").write_text(json.dumps(results))
    report = build_report(read_runs(paths), tmp_path / "out")
    assert "no analysis of coco:" in report.notes[0]
    assert "image 77 of the detections is not in the ground truth" in report.notes[0]
    (tmp_path / "data" / "own.json").unlink()
    report = build_report(read_runs(paths), tmp_path / "out")
    assert "own.json" in report.notes[0]
    assert report.tables[0].analysis is None
    assert "moco" in report.text()
    with pytest.raises(UserError, match="keeps no predictions"):
        analyse_run(tmp_path, open_dataset([]))


def test_deviations_that_groups_share_are_said_once_and_explained(tmp_path):
    shared = ["SOLVER.MAX_ITER 24000 -> 400", "INPUT.MIN_SIZE_TEST 800 -> 192"]
    sentence = "A shorter schedule favours pre-trained weights."
    for seed in range(2):
        write_run(tmp_path / f"a-seed{seed}", seed=seed, deviations=shared, explanation=[sentence])
        own = [*shared, "SEED 1 -> 2"]
        write_run(tmp_path / f"b-seed{seed}", seed=seed, deviations=own, explanation=[sentence])
    report = build_report(read_runs(sorted(tmp_path.iterdir())))
    (table,) = report.tables
    blocks = dict(deviations(table))
    assert blocks == {
        "Deviations from VOC: a (2)": shared,
        "Deviations from VOC: b (3)": own,
        "Effects of the configuration: all groups (1)": [sentence],
    }
    assert sentence in report.text()
    assert report.text().count(shared[0]) == 2
