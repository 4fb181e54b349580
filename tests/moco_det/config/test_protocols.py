"""Protocols against the published table, Detectron2's own model zoo, and their siblings."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.config import get_cfg

from moco_common.errors import UserError
from moco_det.config.defaults import apply_overrides, default_config, flatten
from moco_det.config.protocols import (
    configs_dir,
    deviations,
    differences,
    get_protocol,
    load_config,
    protocol_names,
    split_name,
    stated_keys,
)

SHARED = {
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.GAMMA": 0.1,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "SOLVER.REFERENCE_WORLD_SIZE": 0,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "TEST.PRECISE_BN.ENABLED": True,
    "TEST.PRECISE_BN.NUM_ITER": 200,
    "MODEL.RESNETS.DEPTH": 50,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "INPUT.FORMAT": "RGB",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}
C4 = {
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
}
FPN = {
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.ROI_BOX_HEAD.NORM": "",
    "MODEL.ROI_MASK_HEAD.NORM": "",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 0,
}
COCO = {
    "MODEL.MASK_ON": True,
    "MODEL.ROI_HEADS.NUM_CLASSES": 80,
    "DATASETS.TRAIN": ("coco_2017_train",),
    "DATASETS.TEST": ("coco_2017_val",),
    "INPUT.MIN_SIZE_TRAIN": (640, 672, 704, 736, 768, 800),
    "SOLVER.WARMUP_ITERS": 1000,
}
ONE = {"SOLVER.MAX_ITER": 90_000, "SOLVER.STEPS": (60_000, 80_000)}
TWO = {"SOLVER.MAX_ITER": 180_000, "SOLVER.STEPS": (120_000, 160_000)}
TWELVE = {"SOLVER.MAX_ITER": 12_000, "SOLVER.STEPS": (9_000, 11_000)}
NORMED_HEADS = {
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
    "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
}
VOC = {
    "MODEL.MASK_ON": False,
    "MODEL.ROI_HEADS.NUM_CLASSES": 20,
    "DATASETS.TRAIN": ("voc_2007_trainval", "voc_2012_trainval"),
    "DATASETS.TEST": ("voc_2007_test",),
    "INPUT.MIN_SIZE_TRAIN": tuple(range(480, 801, 32)),
    "SOLVER.MAX_ITER": 24_000,
    "SOLVER.STEPS": (18_000, 22_000),
    "SOLVER.WARMUP_ITERS": 100,
}
DC5 = {
    "MODEL.BACKBONE.NAME": "build_resnet_dc5_backbone",
    "MODEL.RESNETS.RES5_DILATION": 2,
    "MODEL.DC5_CHANNELS": 512,
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.NORM": "",
}
FCN = {
    "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.RES5_DILATION": 2,
    "MODEL.RESNETS.OUT_FEATURES": ["res5"],
    "MODEL.SEM_SEG_HEAD.NAME": "FCNHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res5"],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 256,
    "MODEL.SEM_SEG_HEAD.NUM_CONV": 2,
    "MODEL.SEM_SEG_HEAD.DILATION": 6,
    "MODEL.SEM_SEG_HEAD.NORM": "SyncBN",
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 255,
    "INPUT.SCALE_TRAIN": [0.5, 2.0],
    "INPUT.RANDOM_FLIP": "horizontal",
    "INPUT.MIN_SIZE_TEST": 0,
    "SOLVER.WARMUP_ITERS": 0,
}


def lsj(times):
    """Detectron2's new baselines."""
    return {
        "MODEL.ROI_BOX_HEAD.NORM": "naiveSyncBN_N",
        "MODEL.ROI_MASK_HEAD.NORM": "naiveSyncBN_N",
        "MODEL.RPN.CONV_DIMS": [-1, -1],
        "INPUT.JITTER_SIZE": 1024,
        "INPUT.JITTER_RANGE": [0.1, 2.0],
        "SOLVER.IMS_PER_BATCH": 64,
        "SOLVER.BASE_LR": 0.1,
        "SOLVER.WEIGHT_DECAY": 4e-5,
        "SOLVER.WARMUP_ITERS": 500,
        "SOLVER.WARMUP_FACTOR": 0.067,
        "SOLVER.MAX_ITER": 184_375 * times,
        "SOLVER.STEPS": (163_889 * times, 177_546 * times),
        "SOLVER.AMP.ENABLED": True,
        "TEST.PRECISE_BN.ENABLED": False,
    }


PREVIEW_VOC = {"SOLVER.MAX_ITER": 2_400, "SOLVER.STEPS": (1_800, 2_200)}
TABLE = {
    "VOC": C4 | VOC,
    "VOC-DC5": DC5 | VOC,
    "VOC07": C4
    | VOC
    | {
        "DATASETS.TRAIN": ("voc_2007_trainval",),
        "SOLVER.MAX_ITER": 9_000,
        "SOLVER.STEPS": (6_750, 8_250),
    },
    "VOC-1pct": C4 | VOC | PREVIEW_VOC | {"DATASETS.LABEL_SHARE": 0.01},
    "VOC-10pct": C4 | VOC | PREVIEW_VOC | {"DATASETS.LABEL_SHARE": 0.1},
    "COCO-C4-1x": C4 | COCO | ONE,
    "COCO-C4-2x": C4 | COCO | TWO,
    "COCO-FPN-12k": FPN | COCO | TWELVE,
    "COCO-FPN-12k-1pct": FPN | COCO | TWELVE | {"DATASETS.LABEL_SHARE": 0.01},
    "COCO-FPN-12k-10pct": FPN | COCO | TWELVE | {"DATASETS.LABEL_SHARE": 0.1},
    "COCO-FPN-1x": FPN | COCO | ONE,
    "COCO-FPN-2x": FPN | COCO | TWO,
    "COCO-FPN-12k-4conv1fc": FPN | COCO | TWELVE | NORMED_HEADS,
    "COCO-FPN-1x-4conv1fc": FPN | COCO | ONE | NORMED_HEADS,
    "COCO-FPN-2x-4conv1fc": FPN | COCO | TWO | NORMED_HEADS,
    **{
        f"COCO-FPN-LSJ-{100 * times}ep": FPN | COCO | NORMED_HEADS | lsj(times)
        for times in (1, 2, 4)
    },
    "COCO-keypoints-2x": FPN
    | COCO
    | TWO
    | {
        "MODEL.MASK_ON": False,
        "MODEL.KEYPOINT_ON": True,
        "MODEL.ROI_HEADS.NUM_CLASSES": 1,
        "DATASETS.TRAIN": ("keypoints_coco_2017_train",),
        "DATASETS.TEST": ("keypoints_coco_2017_val",),
    },
    "LVIS-FPN-2x": FPN
    | COCO
    | TWO
    | {
        "MODEL.ROI_HEADS.NUM_CLASSES": 1230,
        "DATASETS.TRAIN": ("lvis_v0.5_train",),
        "DATASETS.TEST": ("lvis_v0.5_val",),
        "TEST.DETECTIONS_PER_IMAGE": 300,
    },
    "Cityscapes-instance": FPN
    | {
        "MODEL.MASK_ON": True,
        "MODEL.ROI_HEADS.NUM_CLASSES": 8,
        "DATASETS.TRAIN": ("cityscapes_fine_instance_seg_train",),
        "DATASETS.TEST": ("cityscapes_fine_instance_seg_val",),
        "INPUT.MIN_SIZE_TEST": 1024,
        "INPUT.MAX_SIZE_TRAIN": 2048,
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.BASE_LR": 0.01,
    },
    "VOC-semseg": FCN
    | {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 21,
        "DATASETS.TRAIN": ("voc_2012_sem_seg_train_aug",),
        "DATASETS.TEST": ("voc_2012_sem_seg_val",),
        "INPUT.CROP.SIZE": [513, 513],
        "SOLVER.BASE_LR": 0.003,
        "SOLVER.MAX_ITER": 30_000,
        "SOLVER.STEPS": (21_000, 27_000),
    },
    "Cityscapes-semseg": FCN
    | {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 19,
        "DATASETS.TRAIN": ("cityscapes_fine_sem_seg_train",),
        "DATASETS.TEST": ("cityscapes_fine_sem_seg_val",),
        "INPUT.CROP.SIZE": [769, 769],
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.MAX_ITER": 90_000,
        "SOLVER.STEPS": (63_000, 81_000),
    },
}
LAYOUT = {
    "MODEL.WEIGHTS",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "INPUT.FORMAT",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "PROTOCOL",
}
SMALLER = {  # sizes, numbers of boxes and length: network, head and training stay VOC's
    *(f"MODEL.RPN.{when}_NMS_TOPK_{of}" for when in ("PRE", "POST") for of in ("TRAIN", "TEST")),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION"),
    *(f"INPUT.{side}_SIZE_{of}" for side in ("MIN", "MAX") for of in ("TRAIN", "TEST")),
    *("SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SOLVER.MAX_ITER", "SOLVER.STEPS"),
    *("SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.PRECISE_BN.NUM_ITER"),
    *("DATALOADER.NUM_WORKERS",),
}
OWN = set(flatten(default_config())) - set(flatten(get_cfg()))


def changed(a, b):
    a, b = flatten(a), flatten(b)
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


def test_the_table_names_every_protocol_but_the_demos():
    assert protocol_names() == sorted([*TABLE, "scenes", "VOC-small"])


def test_precomputed_proposals_are_refused_because_detectron2_unpickles_them():
    with pytest.raises(UserError, match=r"MODEL\.LOAD_PROPOSALS.*can execute code"):
        load_config("VOC", ["MODEL.LOAD_PROPOSALS", "True"])


@pytest.mark.parametrize("epochs", [100, 200, 400])
def test_large_scale_jitter_is_that_of_detectron2s_own_file(epochs):
    lazy = model_zoo.get_config(f"new_baselines/mask_rcnn_R_50_FPN_{epochs}ep_LSJ.py")
    cfg = get_protocol(f"COCO-FPN-LSJ-{epochs}ep-random")
    solver, rates = cfg.SOLVER, lazy.lr_multiplier
    assert lazy.dataloader.train.total_batch_size == solver.IMS_PER_BATCH
    assert (lazy.optimizer.lr, lazy.optimizer.weight_decay) == (solver.BASE_LR, solver.WEIGHT_DECAY)
    assert lazy.optimizer.params.weight_decay_norm == solver.WEIGHT_DECAY_NORM
    assert lazy.train.max_iter == solver.MAX_ITER
    assert list(solver.STEPS) == list(rates.scheduler.milestones)
    assert pytest.approx(rates.warmup_length * 184_375) == solver.WARMUP_ITERS
    assert rates.warmup_factor == solver.WARMUP_FACTOR
    assert lazy.train.amp.enabled == solver.AMP.ENABLED
    assert cfg.MODEL.WEIGHTS == lazy.train.init_checkpoint == ""
    model = lazy.model
    assert list(cfg.MODEL.RPN.CONV_DIMS) == list(model.proposal_generator.head.conv_dims)
    box = model.roi_heads.box_head
    assert box.conv_dims == [cfg.MODEL.ROI_BOX_HEAD.CONV_DIM] * cfg.MODEL.ROI_BOX_HEAD.NUM_CONV
    assert box.fc_dims == [cfg.MODEL.ROI_BOX_HEAD.FC_DIM] * cfg.MODEL.ROI_BOX_HEAD.NUM_FC
    assert len(model.roi_heads.mask_head.conv_dims) == cfg.MODEL.ROI_MASK_HEAD.NUM_CONV + 1
    scale, crop, flip = lazy.dataloader.train.mapper.augmentations
    assert list(cfg.INPUT.JITTER_RANGE) == [scale.min_scale, scale.max_scale]
    assert [scale.target_height, scale.target_width] == [cfg.INPUT.JITTER_SIZE] * 2
    assert list(crop.crop_size) == [cfg.INPUT.JITTER_SIZE] * 2
    assert cfg.INPUT.RANDOM_FLIP == "horizontal"
    assert flip.horizontal
    assert cfg.INPUT.MIN_SIZE_TEST == 800


@pytest.mark.parametrize("name", sorted(TABLE))
def test_resolved_config_is_the_published_protocol(name):
    resolved = flatten(get_protocol(name))
    expected = SHARED | TABLE[name]
    assert {key: resolved[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "zoo", "differing"),
    [
        ("COCO-C4-1x", "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", set()),
        (
            "COCO-FPN-2x",
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
            {"SOLVER.MAX_ITER", "SOLVER.STEPS", "MODEL.FPN.NORM"},
        ),
        (
            "VOC",
            "PascalVOC-Detection/faster_rcnn_R_50_C4.yaml",
            {"SOLVER.MAX_ITER", "SOLVER.STEPS"},
        ),
        (
            "COCO-keypoints-2x",
            "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml",
            {"SOLVER.MAX_ITER", "SOLVER.STEPS", "MODEL.FPN.NORM"},
        ),
        (
            "LVIS-FPN-2x",
            "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
            {"SOLVER.MAX_ITER", "SOLVER.STEPS", "MODEL.FPN.NORM"},
        ),
        (
            "Cityscapes-instance",
            "Cityscapes/mask_rcnn_R_50_FPN.yaml",
            {"MODEL.FPN.NORM", "TEST.EVAL_PERIOD"},
        ),
    ],
)
def test_protocol_differs_from_the_model_zoo_only_in_what_the_paper_changes(name, zoo, differing):
    """Detectron2's own baselines have the same network, data and sizes; FPN has no extra norm."""
    paper = {
        "MODEL.BACKBONE.FREEZE_AT",
        "MODEL.RESNETS.NORM",
        "TEST.PRECISE_BN.ENABLED",
        "SEED",
        "DATALOADER.NUM_WORKERS",
    }
    extra_norm = {"MODEL.ROI_HEADS.NAME"} if "C4" in zoo else set()
    found = changed(get_protocol(name), model_zoo.get_config(zoo))
    assert found - OWN - LAYOUT == paper | extra_norm | differing


@pytest.mark.parametrize("name", sorted(TABLE))
def test_siblings_differ_only_in_what_the_layout_of_the_weights_requires(name):
    moco = get_protocol(name)
    assert changed(moco, get_protocol(f"{name}-moco")) == set()
    assert changed(moco, get_protocol(f"{name}-random")) == {"PROTOCOL"}
    supervised = get_protocol(f"{name}-supervised")
    assert changed(moco, supervised) == LAYOUT
    assert supervised.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]
    assert supervised.MODEL.PIXEL_MEAN == [103.53, 116.28, 123.675]
    assert supervised.INPUT.FORMAT == "BGR"
    assert supervised.MODEL.RESNETS.STRIDE_IN_1X1 is True
    assert supervised.MODEL.WEIGHTS == "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_protocol_says_where_it_comes_from(name):
    source = get_protocol(name).SOURCE
    assert "arXiv:" in source or "preview of this project" in source
    unconfirmed = {"VOC-DC5", "VOC07", "COCO-keypoints-2x", "LVIS-FPN-2x", "Cityscapes-instance"}
    assert ("not stated in the paper" in source.replace("\n", " ")) == (name in unconfirmed)
    assert "from memory" not in source


@pytest.mark.parametrize(
    ("name", "like", "keys"),
    [
        ("COCO-FPN-12k-1pct", "COCO-FPN-12k", {"DATASETS.LABEL_SHARE"}),
        ("COCO-FPN-12k-10pct", "COCO-FPN-12k", {"DATASETS.LABEL_SHARE"}),
        ("COCO-FPN-1x-4conv1fc", "COCO-FPN-1x", set(NORMED_HEADS)),
        ("VOC07", "VOC", {"DATASETS.TRAIN", "SOLVER.MAX_ITER", "SOLVER.STEPS"}),
        ("VOC-small", "VOC", SMALLER),
    ],
)
def test_a_variant_differs_from_its_protocol_in_what_its_name_says(name, like, keys):
    assert changed(get_protocol(name), get_protocol(like)) == keys | {"PROTOCOL", "SOURCE"}


def test_a_name_with_dashes_and_a_start_is_taken_apart():
    assert split_name("COCO-FPN-1x-4conv1fc-random") == ("COCO-FPN-1x-4conv1fc", "random")
    assert split_name("COCO-FPN-12k-1pct") == ("COCO-FPN-12k-1pct", "moco")


def test_unknown_name_lists_the_names_and_the_nearest():
    with pytest.raises(UserError, match=r"'COC-FPN-1x'.*did you mean COCO-FPN-1x\?.*VOC"):
        get_protocol("COC-FPN-1x")


def test_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match="'SOLVER.BASE_RL' in the command line.*SOLVER.BASE_LR"):
        load_config("VOC", ["SOLVER.BASE_RL", "0.1"])
    with pytest.raises(UserError, match="'MAX_ITER'.*SOLVER.MAX_ITER"):
        load_config("VOC", ["MAX_ITER", "10"])


def test_override_of_another_type_or_without_a_value_is_refused():
    with pytest.raises(UserError, match="MAX_ITER takes a whole number such as 24000, not 'many'"):
        load_config("VOC", ["SOLVER.MAX_ITER", "many"])
    with pytest.raises(UserError, match="'SEED' has no partner"):
        load_config("VOC", ["SEED"])


def test_an_integer_is_taken_for_a_float():
    cfg = get_protocol("VOC")
    assert apply_overrides(cfg, ["SOLVER.WEIGHT_DECAY", "0"]) == ["SOLVER.WEIGHT_DECAY"]
    assert cfg.SOLVER.WEIGHT_DECAY == 0.0


def test_python_tags_in_yaml_are_refused_and_not_run(tmp_path):
    trace = tmp_path / "executed"
    file = tmp_path / "evil.yaml"
    file.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{trace}']\n")
    with pytest.raises(UserError, match="not plain YAML"):
        load_config(str(file))
    assert not trace.exists()


def test_a_file_inherits_from_a_protocol_by_name_and_from_a_file_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text("_BASE_: VOC-random\nSOLVER:\n  MAX_ITER: 100\n")
    (tmp_path / "own.yaml").write_text("_BASE_: base.yaml\nSOLVER:\n  STEPS: [80]\n")
    cfg = load_config(str(tmp_path / "own.yaml"), ["SEED", "3"])
    assert changed(cfg, get_protocol("VOC-random")) == {"SOLVER.MAX_ITER", "SOLVER.STEPS", "SEED"}
    assert deviations(cfg) == [
        "SOLVER.MAX_ITER 24000 -> 100",
        "SOLVER.STEPS (18000, 22000) -> (80,)",
    ]


def test_unknown_key_and_circle_in_a_file_are_named_with_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("SOLVER:\n  BASELR: 1.0\n")
    with pytest.raises(UserError, match=r"SOLVER\.BASELR.*a\.yaml.*SOLVER\.BASE_LR"):
        load_config(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("_BASE_: b.yaml\n")
    with pytest.raises(UserError, match="its own _BASE_"):
        load_config(str(tmp_path / "b.yaml"))
    with pytest.raises(UserError, match="cannot read the config .*none.yaml"):
        load_config(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_BASE_: VOC\nSOLVER:\n  MAX_ITR: 3\n", r"'SOLVER\.MAX_ITR' in .*own\.yaml, line 3; the"),
        ("_BASE_: VOC\n\nSOLVER: {STEPS: 3}\n", r"own\.yaml, line 3: SOLVER\.STEPS takes a list"),
        ("SEED: many\n", r"line 1: SEED takes a whole number such as 1, not 'many'"),
        ("SEED: 1\nTEST: {}\nSEED: 2\n", r"line 3, states SEED again \(first in line 1\)"),
        ("SEED: 1\nMODEL: [1, 2\n", r"not plain YAML .*: line 3: "),
        ("- SEED\n", "must hold KEY: VALUE pairs, not a list"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(str(tmp_path / "own.yaml"))


def test_a_whole_number_in_a_file_is_taken_for_a_float(tmp_path):
    (tmp_path / "own.yaml").write_text("_BASE_: VOC\nSOLVER:\n  BASE_LR: 1\n  WEIGHT_DECAY: 1e-5\n")
    cfg = load_config(str(tmp_path / "own.yaml"))
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY) == (1.0, 1e-5)


def test_a_dumped_config_loads_as_itself(tmp_path):
    cfg = load_config("COCO-FPN-1x-random", ["DATASETS.CLASSES", "['a b', 'c']", "SEED", "9"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    loaded = load_config(str(tmp_path / "config.yaml"))
    assert differences(cfg, loaded) == []
    assert isinstance(loaded.SOLVER.STEPS, tuple)


def test_housekeeping_is_no_deviation():
    cfg = load_config("VOC", ["SEED", "5", "OUTPUT_DIR", "x", "MODEL.WEIGHTS", "w.pkl"])
    assert deviations(cfg) == []


def test_configs_are_found_inside_an_installed_package(tmp_path):
    """As a wheel lays them out: the package in one folder, its configs inside it, run elsewhere."""
    package = Path(sys.modules["moco_det"].__file__).parent
    site = tmp_path / "site"
    site.mkdir()
    copy = site / "moco_det"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "configs"))
    (copy / "configs").mkdir()
    for file in configs_dir().glob("*.yaml"):
        (copy / "configs" / file.name).write_bytes(file.read_bytes())
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from moco_det.config.protocols import configs_dir, get_protocol\n"
        "print(configs_dir()); print(get_protocol('VOC').SOLVER.MAX_ITER)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(copy / "configs"), "24000"], done.stderr


def test_bases_that_double_are_read_once_each_and_a_long_chain_is_refused(tmp_path):
    (tmp_path / "0.yaml").write_text("_BASE_: VOC-random\nSOLVER: {MAX_ITER: 100, STEPS: [50]}\n")
    for level in range(1, 18):
        bases = f"_BASE_: [{level - 1}.yaml, {level - 1}.yaml]"
        (tmp_path / f"{level}.yaml").write_text(f"{bases}\nSOLVER: {{MAX_ITER: {100 + level}}}\n")
    began = time.process_time()
    cfg = load_config(str(tmp_path / "17.yaml"))
    assert (cfg.SOLVER.MAX_ITER, list(cfg.SOLVER.STEPS)) == (117, [50])
    assert load_config(str(tmp_path / "3.yaml")).SOLVER.MAX_ITER == 103
    assert set(stated_keys(str(tmp_path / "17.yaml"))) == {"SOLVER.MAX_ITER", "SOLVER.STEPS"}
    assert time.process_time() - began < 20
    for level in range(18, 200):
        (tmp_path / f"{level}.yaml").write_text(f"_BASE_: {level - 1}.yaml\n")
    with pytest.raises(UserError, match="a chain of more than"):
        load_config(str(tmp_path / "199.yaml"))


@pytest.mark.parametrize("base", ["5", "[1, 2]", "{a: b}", "[[VOC]]"])
def test_a_base_that_is_no_name_is_refused(tmp_path, base):
    (tmp_path / "own.yaml").write_text(f"_BASE_: {base}\n")
    with pytest.raises(UserError, match="_BASE_ must be"):
        load_config(str(tmp_path / "own.yaml"))
