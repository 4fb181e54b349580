"""Matching, thresholds and pictures, against naive loops and by reading the pixels back."""

import json
import warnings
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from matplotlib.text import Text
from pycocotools import mask as mask_codec
from torchvision.ops import box_iou as torchvision_box_iou

from moco_common.errors import UserError
from moco_det.report.error_analysis import best_threshold, match
from moco_det.report.example_images import compare_runs, detections_grid
from moco_det.report.predictions_io import annotated_objects, detected_objects
from moco_det.structures.label_map import LabelMap
from moco_det.structures.objects import Objects, box_iou
from moco_det.visualization.detections import draw_objects, save_picture
from moco_det.visualization.label_maps import draw_labels
from moco_det.visualization.palette import COLORS
from moco_det.visualization.visualizer import ObjectVisualizer

GREY = np.full((64, 96, 3), 128, np.uint8)


def objects(boxes, classes=None, scores=None, ignored=None):
    count = len(boxes)
    return Objects(
        np.array(boxes, dtype=float).reshape(-1, 4),
        np.array([0] * count if classes is None else classes, dtype=int),
        None if scores is None else np.array(scores, dtype=float),
        ignored=None if ignored is None else np.array(ignored, dtype=bool),
    )


def random_objects(draw, count, scored):
    corner = draw.uniform(0, 60, (count, 2))
    boxes = np.hstack([corner, corner + draw.uniform(5, 40, (count, 2))])
    return objects(boxes, draw.integers(0, 2, count), draw.random(count) if scored else None)


def naive_match(detections, truth):
    """The definition, one object at a time."""
    overlaps = torchvision_box_iou(torch.tensor(detections.boxes), torch.tensor(truth.boxes))
    taken, right = set(), [False] * len(detections)
    for i in sorted(range(len(detections)), key=lambda i: -detections.scores[i]):
        options = [
            (float(overlaps[i, j]), j)
            for j in range(len(truth))
            if j not in taken and truth.classes[j] == detections.classes[i]
        ]
        best, j = max(options, default=(0.0, -1))
        if best >= 0.5:
            right[i] = True
            taken.add(j)
    return right


def test_iou_is_torchvisions():
    draw = np.random.default_rng(0)
    a, b = (random_objects(draw, n, False).boxes for n in (7, 5))
    expected = torchvision_box_iou(torch.tensor(a), torch.tensor(b)).numpy()
    assert box_iou(a, b) == pytest.approx(expected)


def test_matching_equals_a_naive_loop():
    draw = np.random.default_rng(1)
    found = 0
    for _ in range(60):
        truth = random_objects(draw, 6, False)
        detections = random_objects(draw, 12, True)
        detections.boxes[:6] = truth.boxes + draw.normal(0, 3, (6, 4))
        right = match(detections, truth)
        assert right.tolist() == naive_match(detections, truth)
        found += right.sum()
    assert found > 100


def test_a_second_detection_of_an_object_is_wrong():
    truth = objects([[0, 0, 10, 10]])
    twice = objects([[0, 0, 10, 10], [0, 0, 10, 9]], scores=[0.6, 0.9])
    assert match(twice, truth).tolist() == [False, True]


def test_an_ignored_object_makes_no_detection_wrong_however_many():
    truth = objects([[0, 0, 10, 10]], ignored=[True])
    twice = objects([[0, 0, 10, 10], [0, 0, 10, 9]], scores=[0.6, 0.9])
    assert match(twice, truth).tolist() == [True, True]


def test_best_threshold_is_found_by_trying_them_all():
    draw = np.random.default_rng(2)
    for _ in range(20):
        pairs = [(random_objects(draw, 9, True), random_objects(draw, 4, False)) for _ in range(4)]
        for detections, truth in pairs:
            detections.boxes[:3] = truth.boxes[:3]
            detections.classes[:3] = truth.classes[:3]
        best = max(
            (f1(pairs, t), t) for d, _ in pairs for t in d.scores
        )  # exhaustive, by the definition of F1
        assert f1(pairs, best_threshold(pairs)) == pytest.approx(best[0])


def test_objects_that_were_missed_lower_the_best_threshold():
    """Right, three wrong, right: F1 2/3 at the first and 4/7 at the last, of 2 objects."""
    truth = objects([[0, 0, 10, 10], [20, 20, 30, 30]])
    wrong = [[50, 50, 60, 60]] * 3
    detections = objects(
        [[0, 0, 10, 10], *wrong, [20, 20, 30, 30]], scores=[0.9, 0.8, 0.7, 0.6, 0.5]
    )
    assert best_threshold([(detections, truth)]) == 0.9
    missed = objects([[100 * i, 100, 100 * i + 10, 110] for i in range(3)])  # now 2/6 and 4/10
    assert best_threshold([(detections, truth), (objects([], scores=[]), missed)]) == 0.5


def test_results_are_read_in_cocos_layout():
    result = {"category_id": 7, "bbox": [10, 20, 30, 40], "score": 0.5}
    found = detected_objects([result], ids={3: 0, 7: 1})
    assert found.boxes.tolist() == [[10, 20, 40, 60]]
    assert (found.classes.tolist(), found.scores.tolist()) == ([1], [0.5])


def f1(pairs, threshold):
    hits = shown = wanted = 0
    for detections, truth in pairs:
        kept = detections.select(detections.scores >= threshold)
        hits += match(kept, truth).sum()
        shown += len(kept)
        wanted += len(truth)
    return 2 * hits / (shown + wanted)


def test_best_threshold_without_anything_right_is_a_half():
    assert best_threshold([]) == 0.5
    assert best_threshold([(objects([[0, 0, 1, 1]], scores=[0.9]), objects([]))]) == 0.5


def test_a_box_is_drawn_where_it_is_in_its_colour(tmp_path):
    image = np.full((400, 500, 3), 128, np.uint8)
    path = save_picture(image, objects([[100, 50, 300, 250]], [1]), ["a", "b"], tmp_path / "p.png")
    picture = cv2.imread(str(path))[:, :, ::-1]
    assert picture.shape == image.shape
    color = np.array([int(COLORS[1][i : i + 2], 16) for i in (1, 3, 5)])
    rows, columns = np.nonzero(np.abs(picture.astype(int) - color).max(axis=2) < 30)
    below_label = rows > 60
    assert abs(columns[below_label].min() - 100) <= 3
    assert abs(columns[below_label].max() - 300) <= 3
    assert abs(rows.max() - 250) <= 3
    assert (picture[150, 200] == 128).all()  # a box is not filled


def test_a_mask_tints_its_pixels_only(tmp_path):
    found = objects([[10, 10, 40, 40]])
    found.masks = np.zeros((1, 64, 96), bool)
    found.masks[0, 15:35, 15:35] = True
    path = save_picture(GREY, found, ["a"], tmp_path / "p.png")
    picture = cv2.imread(str(path))
    scale = picture.shape[1] / 96
    assert (picture[int(25 * scale), int(25 * scale)] != 128).any()
    assert (picture[int(55 * scale), int(70 * scale)] == 128).all()


def test_an_empty_mask_changes_nothing_and_a_full_one_reaches_the_edges():
    found = objects([[0, 0, 96, 64]] * 2)
    found.masks = np.stack([np.zeros((64, 96), bool), np.ones((64, 96), bool)])
    picture = draw_objects(GREY, found.select(np.array([0])), ["a"], with_names=False)
    assert (picture[20:40, 20:40] == 128).all()
    picture = draw_objects(GREY, found, ["a"], with_names=False)
    assert (picture != 128).any(axis=2).all()


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("shape", [(40, 2), (2, 40), (40, 1), (500, 2), (64, 96)])
def test_masks_on_an_image_of_any_shape_are_drawn_and_none_at_all_too(shape, count, tmp_path):
    """Detectron2's own drawing of masks asserts that an image is not two pixels wide."""
    found = replace(objects([[0, 0, *shape[::-1]]] * count), masks=np.ones((count, *shape), bool))
    path = save_picture(np.full((*shape, 3), 128, np.uint8), found, ["a"], tmp_path / "p.png")
    picture = cv2.imread(str(path))
    assert max(picture.shape[:2]) == max(*shape, 320)
    assert (picture == 128).all() == (count == 0)


def test_the_hole_of_a_mask_is_not_tinted():
    ring = np.zeros((1, 64, 96), bool)
    ring[0, 10:50, 10:50] = True
    ring[0, 20:40, 20:40] = False
    found = objects([[10, 10, 50, 50]])
    found.masks = ring
    picture = draw_objects(GREY, found, ["a"], with_names=False)
    assert (picture[25:35, 25:35] == 128).all()
    assert (picture[14:17, 30] != 128).any()


@pytest.mark.parametrize("name", ["$a$", "${", "a $ b|c\\", "кошка", "γάτα", "<b>&amp;"])
def test_any_class_name_is_drawn_as_it_is(name, monkeypatch):
    """Signs such as $ reach the picture and start no formula."""
    seen = []
    image = np.full((200, 300, 3), 128, np.uint8)
    draw = Text.draw

    def keep(text, renderer):
        if text.get_text():
            seen.append(text._preprocess_math(text.get_text()))
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", keep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of a glyph that the font lacks
        draw_objects(image, objects([[50, 50, 200, 150]], scores=[0.5]), [name])
        labels = LabelMap(np.zeros((200, 300), np.uint8), np.ones((200, 300), np.float32))
        draw_labels(image, labels, [name])
    assert seen == [(f"{name} 0.50", False), (name, False)]


def test_a_label_at_the_right_edge_lies_inside_the_image():
    image = np.full((200, 300, 3), 128, np.uint8)
    visualizer = ObjectVisualizer(image)
    visualizer.draw_text("a long class name 0.97", (290, 195), horizontal_alignment="left")
    extent = visualizer.output.ax.texts[-1].get_window_extent()
    assert 0 <= extent.x0 < extent.x1 <= 300
    assert 0 <= extent.y0 < extent.y1 <= 200


def test_ignored_annotations_are_dotted():
    image = np.full((200, 300, 3), 128, np.uint8)

    def colored(**more):
        drawn = draw_objects(image, objects([[50, 50, 250, 150]], **more), ["a"], with_names=False)
        return (drawn != 128).any(axis=2).sum()

    assert 0.3 * colored() < colored(ignored=[True]) < 0.8 * colored()


def test_wrong_detections_are_dashed(tmp_path):
    def drawn_pixels(name, box):
        truth, found = objects([[20, 10, 60, 50]]), objects([box], scores=[0.9])
        path = detections_grid([GREY], [truth], {"model": [found]}, ["a"], tmp_path / name)
        color = np.array([int(COLORS[0][i : i + 2], 16) for i in (1, 3, 5)])
        picture = cv2.imread(str(path))[:, :, ::-1].astype(int)
        right_half = picture[:-60, picture.shape[1] // 2 :]  # the model's column, no legend
        return (np.abs(right_half - color).max(axis=2) < 30).sum()

    solid, dashed = drawn_pixels("a.png", [20, 10, 60, 50]), drawn_pixels("b.png", [50, 10, 90, 50])
    assert dashed < 0.8 * solid


def test_grid_takes_images_of_any_size_and_none_found(tmp_path):
    images = [np.zeros((h, w, 3), np.uint8) for h, w in ((30, 200), (700, 500), (1, 1))]
    nothing = [objects([], scores=[]) for _ in images]
    path = detections_grid(
        images, [objects([]) for _ in images], {"a": nothing, "b": nothing}, [], tmp_path / "g.png"
    )
    assert cv2.imread(str(path)).shape[1] > 3 * 200


def test_grid_refuses_columns_of_unequal_length(tmp_path):
    with pytest.raises(ValueError, match="each image"):
        detections_grid([GREY], [objects([])], {"a": []}, ["x"], tmp_path / "g.png")


def test_polygons_and_run_lengths_give_the_same_masks():
    polygon = [[10.0, 10.0, 40.0, 10.0, 40.0, 30.0, 10.0, 30.0]]
    packed = mask_codec.merge(mask_codec.frPyObjects(polygon, 64, 96))
    text = {"size": [64, 96], "counts": packed["counts"].decode()}
    dense = mask_codec.decode(packed)
    runs = np.diff(np.flatnonzero(np.diff(dense.ravel("F"), prepend=0, append=2)), prepend=0)
    lists = {"size": [64, 96], "counts": runs.tolist()}
    record = {"height": 64, "width": 96, "annotations": []}
    for code in (polygon, packed, text, lists):
        box = {"bbox": [10, 10, 30, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        record["annotations"].append({**box, "segmentation": code})
    found = annotated_objects(record, masks=True)
    assert found.boxes.tolist() == [[10, 10, 40, 30]] * 4
    assert found.masks[0, 11:29, 11:39].all()
    assert all((mask == found.masks[0]).all() for mask in found.masks)


def write_dataset(root, count=9):
    """Dataset dicts of grey images with one object each, and a run that finds some of them."""
    root.mkdir()
    records, results = [], []
    for i in range(count):
        file = root / f"{i}.png"
        cv2.imwrite(str(file), np.full((64, 96, 3), 20 * i, np.uint8))
        box = {"bbox": [20, 10, 60, 50], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        records.append(
            {"file_name": str(file), "image_id": i, "height": 64, "width": 96,
             "annotations": [box] if i else []}
        )  # fmt: skip
        results.append({"image_id": i, "category_id": 0, "bbox": [20, 10, 40, 40], "score": 0.7})
    (root / "run" / "inference").mkdir(parents=True)
    file = root / "run" / "inference" / "coco_instances_results.json"
    file.write_text(json.dumps(results))
    return records


def test_runs_are_compared_on_the_same_images_each_time(tmp_path):
    records = write_dataset(tmp_path / "d")
    paths = [
        compare_runs(records, {"mine": tmp_path / "d" / "run"}, tmp_path / name, 3, seed)
        for name, seed in (("a.png", 0), ("b.png", 0), ("c.png", 1))
    ]
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again != other


def test_comparing_a_run_without_predictions_names_it(tmp_path):
    records = write_dataset(tmp_path / "d")
    with pytest.raises(UserError, match="keeps no predictions"):
        compare_runs(records, {"x": tmp_path / "elsewhere"}, tmp_path / "p.png")
    broken = tmp_path / "d" / "run" / "inference" / "coco_instances_results.json"
    broken.write_text('[{"image_id": 1')
    with pytest.raises(UserError, match="not a list of COCO results"):
        compare_runs(records, {"x": tmp_path / "d" / "run"}, tmp_path / "p.png")


def test_comparing_on_images_without_annotations_is_an_error(tmp_path):
    records = write_dataset(tmp_path / "d")[:1]
    with pytest.raises(UserError, match="none of the 1 images has annotations"):
        compare_runs(records, {"x": tmp_path / "d" / "run"}, tmp_path / "p.png")
