"""The FCN, its images and its metric, against the formulas written out."""

import math

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from PIL import Image
from torch.nn import functional as F

from moco_common.errors import UserError
from moco_det.config.protocols import load_config
from moco_det.data.dataset_mapper import RandomScale, SemanticMapper
from moco_det.data.datasets.label_files import read_labels
from moco_det.data.register import register
from moco_det.evaluation.sem_seg_evaluation import SemanticEvaluator, confusion, scores
from moco_det.modeling.sem_seg_head import FCNHead, upsample_aligned
from tests.moco_det.ranks import on_ranks

CLASSES = ["ground", "sky", "car", "never"]


def head(**changes):
    options = {"channels": 4, "num_conv": 2, "dilation": 6, "norm": "BN"} | changes
    return FCNHead(ShapeSpec(channels=5, stride=16), num_classes=3, **options)


def test_the_head_is_two_dilated_convolutions_and_a_classifier():
    torch.manual_seed(0)
    fcn = head().eval()
    x = torch.randn(2, 5, 9, 11)
    expected = x
    for conv in fcn.convs:
        conv.norm.running_mean.fill_(0.1)
        y = F.conv2d(expected, conv.weight, padding=6, dilation=6)
        n = conv.norm
        y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)
        expected = y.clamp(min=0)
    expected = F.conv2d(expected, fcn.predictor.weight, fcn.predictor.bias)
    with torch.no_grad():
        logits, losses = fcn({"res5": x})
    assert losses == {}
    assert logits.shape == (2, 3, 144, 176)
    torch.testing.assert_close(logits[:, :, ::16, ::16], expected)
    assert SEM_SEG_HEADS_REGISTRY.get("FCNHead") is FCNHead


def test_upsampling_leaves_values_at_their_pixels_and_is_linear_between():
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    y = upsample_aligned(x, 4)
    assert y.shape == (1, 2, 12, 16)
    torch.testing.assert_close(y[..., ::4, ::4], x)
    torch.testing.assert_close(y[..., 0, 1], 0.75 * x[..., 0, 0] + 0.25 * x[..., 0, 1])
    torch.testing.assert_close(y[..., 2, 4], (x[..., 0, 1] + x[..., 1, 1]) / 2)
    torch.testing.assert_close(y[..., 11, 15], x[..., 2, 3])  # constant behind the last


def test_a_crop_of_513_pixels_is_covered_exactly():
    """33 values at stride 16 end at pixel 512: nothing is extrapolated."""
    x = torch.linspace(0, 512, 33).expand(1, 1, 33, 33)
    torch.testing.assert_close(upsample_aligned(x, 16)[0, 0, 0, :513], torch.arange(513.0))


def test_the_loss_is_the_mean_over_the_pixels_that_count():
    """Oracle: a loop over pixels. A crop of ignored pixels alone has no loss, and a gradient."""
    torch.manual_seed(1)
    fcn = head(norm="").train()
    x = torch.randn(1, 5, 2, 2, requires_grad=True)
    targets = torch.randint(0, 3, (1, 20, 18))
    targets[0, :5] = 255
    _, losses = fcn({"res5": x}, targets)
    with torch.no_grad():
        logits = upsample_aligned(fcn.predictor(fcn.convs(x)), 16)[0]
    terms = [
        -float(logits[:, r, c].log_softmax(0)[targets[0, r, c]])
        for r in range(20)
        for c in range(18)
        if targets[0, r, c] != 255
    ]
    assert losses["loss_sem_seg"].item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    _, none = fcn({"res5": x}, torch.full((1, 20, 18), 255))
    none["loss_sem_seg"].backward()
    assert none["loss_sem_seg"].item() == 0
    assert bool(torch.isfinite(x.grad).all())


def test_labels_are_a_palettes_indices_and_not_its_colours(tmp_path):
    labels = np.array([[0, 1, 255], [2, 3, 15]], dtype=np.uint8)
    image = Image.fromarray(labels, mode="P")
    image.putpalette(bytes(np.random.default_rng(0).integers(0, 255, 768, dtype=np.uint8)))
    image.save(tmp_path / "palette.png")
    Image.fromarray(labels).save(tmp_path / "grey.png")
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "rgb.png")
    assert (read_labels(tmp_path / "palette.png") == labels).all()
    assert (read_labels(tmp_path / "grey.png") == labels).all()
    with pytest.raises(UserError, match=r"rgb\.png has the mode RGB, so it holds no labels"):
        read_labels(tmp_path / "rgb.png")


def test_image_and_labels_are_scaled_cropped_and_flipped_together(tmp_path):
    """The image shows its labels, so that they must agree after any augmentation."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 4, (6, 8), dtype=np.uint8)
    labels = np.kron(coarse, np.ones((16, 16), np.uint8))
    Image.fromarray(np.stack([labels * 60] * 3, axis=2)).save(tmp_path / "image.png")
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record = {"file_name": str(tmp_path / "image.png"), "image_id": 1}
    record["sem_seg_file_name"] = str(tmp_path / "labels.png")
    mapper = SemanticMapper.from_config(load_config("VOC-semseg", ["INPUT.CROP.SIZE", "[70, 90]"]))
    np.random.seed(0)
    sizes, agreement = set(), []
    for _ in range(12):
        example = mapper(record)
        image, seg = example["image"], example["sem_seg"]
        assert image.dtype == torch.uint8
        assert seg.dtype == torch.int64
        assert image.shape[1:] == seg.shape
        assert seg.shape[0] <= 70
        assert seg.shape[1] <= 90
        sizes.add(tuple(seg.shape))
        agreement.append(float((torch.round(image[0] / 60) == seg).float().mean()))
    assert min(agreement) > 0.85  # bilinear edges differ from the nearest neighbour's
    assert len(sizes) > 2  # smaller images stay small


def test_the_scale_is_drawn_between_its_bounds():
    np.random.seed(0)
    scale = RandomScale(0.5, 2.0)
    shapes = [scale.get_transform(np.zeros((100, 60, 3))) for _ in range(200)]
    factors = np.array([t.new_h / 100 for t in shapes])
    assert all(abs(t.new_w / 60 - t.new_h / 100) < 0.02 for t in shapes)
    assert 0.5 <= factors.min() < 0.56
    assert 1.9 < factors.max() <= 2.0


def naive_metrics(pairs, num_classes, ignore):
    """IoU and accuracy of each class by sets of pixels."""
    iou, accuracy = [], []
    for k in range(num_classes):
        shared = union = annotated = 0
        for labels, predicted in pairs:
            for row in range(labels.shape[0]):
                for column in range(labels.shape[1]):
                    truth, found = labels[row, column], predicted[row, column]
                    if truth == ignore:
                        continue
                    shared += truth == k and found == k
                    union += truth == k or found == k
                    annotated += truth == k
        iou.append(shared / union if union else math.nan)
        accuracy.append(shared / annotated if annotated else math.nan)
    return iou, accuracy


def test_the_metrics_are_those_of_loops_over_pixels():
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 3, (7, 9)), rng.integers(0, 3, (7, 9))) for _ in range(3)]
    for labels, _ in pairs:
        labels[0] = 255
    total = sum(confusion(labels, predicted, 4, 255) for labels, predicted in pairs)
    found = scores(total, CLASSES)
    iou, accuracy = naive_metrics(pairs, 4, 255)
    assert [found[f"IoU-{name}"] / 100 for name in CLASSES] == pytest.approx(iou, nan_ok=True)
    assert math.isnan(found["IoU-never"])
    assert found["mIoU"] / 100 == pytest.approx(np.mean(iou[:3]))
    assert found["mACC"] / 100 == pytest.approx(np.mean(accuracy[:3]))
    right = sum(int(((a == b) & (a != 255)).sum()) for a, b in pairs)
    counted = sum(int((a != 255).sum()) for a, _ in pairs)
    assert found["pACC"] / 100 == pytest.approx(right / counted)


def test_a_class_that_is_only_predicted_counts_as_zero():
    counts = np.array([[4, 2], [0, 0]])
    assert scores(counts, ["a", "b"])["mIoU"] == pytest.approx(100 * (4 / 6 + 0) / 2)
    assert math.isnan(scores(np.zeros((2, 2), int), ["a", "b"])["mIoU"])


def test_labels_that_are_no_class_or_of_another_size_are_refused():
    with pytest.raises(UserError, match="x.png has the label 9, but the classes are 3, counted"):
        confusion(np.full((2, 2), 9), np.zeros((2, 2), int), 3, 255, "x.png")
    with pytest.raises(UserError, match=r"has the size \(2, 2\), its image \(2, 3\)"):
        confusion(np.zeros((2, 2), int), np.zeros((2, 3), int), 3, 255)


def write_pairs(root, count=4):
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        cv2.imwrite(str(root / f"images/{i}.jpg"), rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        labels = rng.integers(0, 3, (6, 8), dtype=np.uint8)
        labels[0] = 255
        cv2.imwrite(str(root / f"labels/{i}.png"), labels)
    return f"semseg:{root / 'images'}:{root / 'labels'}"


def predictions(name):
    """Logits that are right in half of the pixels, record by record."""
    rng = np.random.default_rng(1)
    classes = len(MetadataCatalog.get(name).stuff_classes)
    for record in DatasetCatalog.get(name):
        labels = read_labels(record["sem_seg_file_name"])
        guess = np.where(rng.random(labels.shape) < 0.5, labels, 1) % classes
        yield record, {"sem_seg": torch.eye(classes)[torch.as_tensor(guess)].permute(2, 0, 1)}


def _evaluate_a_share(rank, folder):
    name = register(f"semseg:{folder}/images:{folder}/labels")
    evaluator = SemanticEvaluator(name)
    for index, (record, output) in enumerate(predictions(name)):
        if index % 2 == rank or index == 0:  # a sampler that gives one image to both
            evaluator.process([record], [output])
    return evaluator.evaluate()


def test_two_processes_measure_what_one_does_and_count_each_image_once(tmp_path):
    name = register(write_pairs(tmp_path))
    evaluator = SemanticEvaluator(name, distributed=False)
    pairs = []
    for record, output in predictions(name):
        evaluator.process([record], [output])
        pairs.append(
            (read_labels(record["sem_seg_file_name"]), output["sem_seg"].argmax(0).numpy())
        )
    alone = evaluator.evaluate()
    iou, _ = naive_metrics(pairs, 3, 255)
    assert alone["sem_seg"]["mIoU"] == pytest.approx(100 * np.mean(iou))
    first, second = on_ranks(2, _evaluate_a_share, str(tmp_path))
    assert second == {}
    assert first == alone


def test_own_images_and_labels_pair_up_by_name_and_what_is_wrong_is_named(tmp_path):
    spec = write_pairs(tmp_path)
    (tmp_path / "labels/3.png").unlink()
    cv2.imwrite(str(tmp_path / "labels/2.png"), np.zeros((3, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "labels/stray.png"), np.zeros((3, 3), np.uint8))
    (tmp_path / "labels/classes.txt").write_text("ground\nsky\ncar\n")
    name = register(spec)
    records = DatasetCatalog.get(name)
    assert [(r["image_id"], r["width"], r["height"]) for r in records] == [("0", 8, 6), ("1", 8, 6)]
    metadata = MetadataCatalog.get(name)
    assert metadata.stuff_classes == ["ground", "sky", "car"]
    found = {(f.kind, f.file) for f in metadata.report.findings}
    assert found == {
        ("labels missing", "3.jpg"),
        ("image missing", "stray.png"),
        ("labels of another size", "2.png"),
    }
    assert ": 2 images with labels, 3 classes\n  1 x labels missing" in metadata.report.summary()
    with pytest.raises(UserError, match="3 faults in"):
        register(spec, strict=True)
    with pytest.raises(UserError, match="has 3 classes, but there can be only 2"):
        register(spec, classes=["a", "b"])
    with pytest.raises(UserError, match="there is no folder"):
        register("semseg:nowhere:nothing")
