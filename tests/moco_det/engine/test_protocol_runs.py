"""Every protocol through the command line: a step, a checkpoint, an evaluation, on its own data.

The data sets are tiny, in the layouts and under the names of the real ones, and registered by
Detectron2's own functions.
"""

import json
import math
import multiprocessing
import shutil
from multiprocessing.pool import ThreadPool

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin

from moco_common.errors import UserError
from moco_det.config.protocols import get_protocol, protocol_names
from moco_det.data.datasets.coco_keypoints import flip_map
from moco_det.data.samplers import load_training_set
from moco_det.engine.setup import Options, prepare
from moco_det.evaluation.build import evaluated_tasks
from moco_det.evaluation.results import headline, with_classes_apart
from tests.conftest import NARROW, QUICK
from tests.moco_det import builtin_data
from tools.train_net import main

SMALL = [
    *NARROW,
    *QUICK,
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100", "MODEL.RPN.PRE_NMS_TOPK_TEST", "50"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "16", "MODEL.ROI_BOX_HEAD.CONV_DIM", "8"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "8"),
    *("MODEL.DC5_CHANNELS", "8", "INPUT.CROP.SIZE", "[33, 33]", "SOLVER.MAX_ITER", "1"),
    *("TEST.DETECTIONS_PER_IMAGE", "5", "TEST.PRECISE_BN.NUM_ITER", "1"),
    *("SOLVER.AMP.PRECISION", "bfloat16"),
]
SMALLER = ["INPUT.JITTER_SIZE", "96"]  # of the protocols with large-scale jitter
BOX, MASK = {"bbox": "AP"}, {"bbox": "AP", "segm": "AP"}
TASKS = {
    "VOC": BOX,
    "VOC-DC5": BOX,
    "VOC07": BOX,
    "VOC-1pct": BOX,
    "VOC-10pct": BOX,
    "VOC-small": BOX,
    "COCO-C4-1x": MASK,
    "COCO-C4-2x": MASK,
    **{f"COCO-FPN-{length}": MASK for length in ("12k", "1x", "2x")},
    **{f"COCO-FPN-{length}-4conv1fc": MASK for length in ("12k", "1x", "2x")},
    **{f"COCO-FPN-LSJ-{epochs}ep": MASK for epochs in (100, 200, 400)},
    "COCO-FPN-12k-1pct": MASK,
    "COCO-FPN-12k-10pct": MASK,
    "COCO-keypoints-2x": {"bbox": "AP", "keypoints": "AP"},
    "LVIS-FPN-2x": {"bbox": "APr", "segm": "APf"},
    "Cityscapes-instance": {"segm": "AP50"},
    "VOC-semseg": {"sem_seg": "mIoU"},
    "Cityscapes-semseg": {"sem_seg": "mIoU"},
}


@pytest.fixture(autouse=True)
def no_forks_of_threads(monkeypatch):
    """Detectron2 reads Cityscapes in a pool of forks, which may hang once a process has threads."""
    monkeypatch.setattr(multiprocessing, "Pool", ThreadPool)


@pytest.fixture(scope="module")
def datasets_root(tmp_path_factory):
    """Detectron2's catalogs, filled anew from a folder of tiny data."""
    root = tmp_path_factory.mktemp("datasets")
    builtin_data.write_coco(root)
    builtin_data.write_coco(root, lvis=True)
    builtin_data.write_voc(root)
    builtin_data.write_cityscapes(root)
    before = [dict(catalog.data) for catalog in (DatasetCatalog, MetadataCatalog)]
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.data.clear()
    for register in ("coco", "lvis", "cityscapes", "pascal_voc"):
        getattr(builtin, f"register_all_{register}")(str(root))
    yield root
    for catalog, data in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        catalog.data.clear()
        catalog.data.update(data)


def test_the_table_names_every_protocol_but_the_demos():
    assert set(protocol_names()) == TASKS.keys() | {"scenes"}


@pytest.mark.parametrize("name", TASKS)
def test_a_protocol_trains_saves_and_evaluates_on_its_own_data(
    name, datasets_root, tmp_path, monkeypatch, capsys
):
    if name == "Cityscapes-instance":
        pytest.importorskip("cityscapesscripts")
    if name.startswith(("Cityscapes-instance", "COCO-FPN-LSJ")):
        pytest.importorskip("shapely")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_root))
    run = tmp_path / "run"
    small = [*SMALL, *(SMALLER if "LSJ" in name else ())]
    assert main(["--config", f"{name}-random", "--output-dir", str(run), *small]) == 0, (
        capsys.readouterr().err
    )
    results = json.loads((run / "results.json").read_text())
    assert results["protocol"] == name
    assert results["dataset"] == get_protocol(name).DATASETS.TEST[0]
    for task, metric in TASKS[name].items():
        value = results[task][metric]
        assert value is None or 0 <= value <= 100
    assert ("bbox" in results) == ("bbox" in TASKS[name])
    assert any(sentence.startswith("Source: ") for sentence in results["explanation"])
    state = torch.load(run / "model_final.pth", weights_only=True)["model"]
    assert all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())


def test_a_tenth_of_the_labels_is_what_a_preview_trains_on(datasets_root):
    """Of two times two images one each: at least one is kept of every data set."""
    cfg = get_protocol("VOC-10pct")
    chosen = {record["file_name"] for record in load_training_set(cfg).images}
    assert len(chosen) == 2
    for name in cfg.DATASETS.TRAIN:
        images = {record["file_name"] for record in DatasetCatalog.get(name)}
        assert len(images) == 2
        assert len(images & chosen) == 1


def test_own_images_with_pixel_labels(datasets_root, tmp_path, capsys):
    images = datasets_root / "cityscapes/leftImg8bit/train" / builtin_data.CITY
    labels = tmp_path / "labels"
    labels.mkdir()
    folder = datasets_root / "cityscapes/gtFine/train" / builtin_data.CITY
    for image in images.iterdir():
        file = image.name.replace("leftImg8bit", "gtFine_labelTrainIds")
        shutil.copy(folder / file, labels / image.name)
    spec, run = f"semseg:{images}:{labels}", tmp_path / "run"
    args = ["--config", "VOC-semseg-random", "--train-data", spec, "--test-data", spec]
    assert main([*args, "--output-dir", str(run), *SMALL]) == 0, capsys.readouterr().err
    assert "sem_seg    mIoU" in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert set(results["sem_seg"]["per_class"]) == {f"class {k}" for k in range(14)}
    assert results["sem_seg"]["per_class"]["class 5"] in (None, 0)
    assert results["dataset"] == spec


def test_own_keypoints_from_a_coco_file(datasets_root, tmp_path, capsys):
    """Three points instead of COCO's 17: their number and what a flip swaps follow the data."""
    source = datasets_root / "coco/annotations/person_keypoints_train2017.json"
    content = json.loads(source.read_text())
    content["categories"][0]["keypoints"] = ["nose", "left_ear", "right_ear"]
    for item in content["annotations"]:
        item["keypoints"] = item["keypoints"][:9]
        item["num_keypoints"] = 3
    train, test = (
        f"coco:{tmp_path / name}:{datasets_root / 'coco/train2017'}"
        for name in ("train.json", "test.json")
    )
    for name in ("train.json", "test.json"):
        (tmp_path / name).write_text(json.dumps(content))
    args = ["--config", "COCO-keypoints-2x-random", "--train-data", train, "--test-data", test]
    assert main([*args, "--output-dir", str(tmp_path / "run"), *SMALL]) == 0, (
        capsys.readouterr().err
    )
    assert "keypoints  3, of which a flip swaps 1 pair" in capsys.readouterr().out
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {"bbox", "keypoints"} <= results.keys()
    state = torch.load(tmp_path / "run/model_final.pth", weights_only=True)["model"]
    assert state["roi_heads.keypoint_head.score_lowres.bias"].shape == (3,)
    # A new process evaluates without the training set.
    DatasetCatalog.remove(train)
    MetadataCatalog.remove(train)
    assert main(["--eval-only", "--output-dir", str(tmp_path / "run")]) == 0
    again = json.loads((tmp_path / "run/results.json").read_text())
    assert again["keypoints"] == results["keypoints"]


def test_data_of_another_kind_than_the_protocols_are_refused(datasets_root, voc_dir, tmp_path):
    def error(protocol, *data):
        with pytest.raises(UserError) as caught:
            prepare(Options(f"{protocol}-random", data, overrides=["MODEL.DEVICE", "cpu"]))
        return str(caught.value)

    assert "has no objects" in error("VOC", f"semseg:{tmp_path}:{tmp_path}")
    assert "has no pixel labels" in error("VOC-semseg", "coco_2017_train")
    assert "is not a data set of pixel labels" in error("VOC-semseg", f"voc:{voc_dir}:trainval")


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["nose", "left_eye", "right_eye"], [("left_eye", "right_eye")]),
        (["eye_l", "eye_r", "lip"], [("eye_l", "eye_r")]),
        (["LEye", "REye", "Lip"], [("LEye", "REye")]),
        (["Left Ear", "Right Ear"], [("Left Ear", "Right Ear")]),
        (["left_only", "tail"], []),
        (["R_hip", "L_hip"], [("R_hip", "L_hip")]),
    ],
)
def test_a_flip_swaps_what_is_named_left_and_right(names, pairs):
    assert flip_map(names) == pairs


def test_a_model_is_evaluated_for_what_it_and_the_data_both_have():
    keypoints, masks = get_protocol("COCO-keypoints-2x"), get_protocol("COCO-FPN-1x")
    assert evaluated_tasks(keypoints, "keypoints_coco_2017_val") == ("bbox", "keypoints")
    assert evaluated_tasks(keypoints, "coco_2017_val") == ("bbox",)
    assert evaluated_tasks(masks, "coco_2017_val") == ("bbox", "segm")
    assert evaluated_tasks(masks, "voc_2007_test") == ("bbox",)
    with pytest.raises(UserError, match="evaluated for segm, which the model does not predict"):
        evaluated_tasks(get_protocol("VOC"), "cityscapes_fine_instance_seg_val")
    assert evaluated_tasks(get_protocol("VOC-semseg"), "cityscapes_fine_sem_seg_val") == (
        "sem_seg",
    )


def test_scores_of_classes_stand_apart_and_the_headline_is_short():
    scores = {"mIoU": 40.0, "pACC": 80.123, "IoU-bus-stop": 7.0, "IoU-car": math.nan}
    apart = with_classes_apart(scores)
    assert apart["per_class"]["bus-stop"] == 7.0
    assert set(apart) == {"mIoU", "pACC", "per_class"}
    assert headline(apart) == "mIoU 40.00  pACC 80.12"
    assert "nothing to find for this task" in headline({"AP": math.nan, "APs": math.nan})
    assert headline({"AP": 1.0, "APs": math.nan, "per_class": {"a": math.nan}}) == "AP 1.00"
