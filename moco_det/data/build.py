"""The data of a run: specs and names into a config, everything read and checked beforehand."""

import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from moco_common.errors import UserError
from moco_common.text import counted
from moco_det.config.defaults import is_semantic_model
from moco_det.data.datasets.sem_seg import is_semantic, register_semantic
from moco_det.data.label_subsets import register_label_share
from moco_det.data.register import dataset_report
from moco_det.data.register import register as register_detection

# What Detectron2 needs to read some of its own data sets, by their evaluator_type.
NEEDED = {
    "lvis": (("lvis",), "pip install lvis"),
    "cityscapes_instance": (
        ("cityscapesscripts", "shapely"),
        "pip install 'moco-det[cityscapes]'",
    ),
}


def settle_data(
    cfg: CfgNode,
    explicit: Sequence[str],
    train_data: Sequence[str],
    test_data: str | None,
    eval_only: bool,
) -> list[str]:
    """Own data into the config, in place: specs, classes, masks, keypoints.

    Args:
        cfg: the config so far.
        explicit: keys that the user has set.
        train_data, test_data: specs from the command line.
        eval_only: the training data are not needed, where the config knows its classes.

    Returns:
        Lines about the data for the log.

    Raises:
        UserError: data that are missing, unreadable or of another kind than the protocol needs.
    """
    if train_data:
        cfg.DATASETS.TRAIN = tuple(train_data)
        cfg.DATASETS.CLASSES = []
        if not test_data:
            cfg.DATASETS.TEST = ()
    if test_data:
        cfg.DATASETS.TEST = (test_data,)
    if len(cfg.DATASETS.TEST) > 1:
        raise UserError(f"one run has one test set, not {', '.join(cfg.DATASETS.TEST)}.")
    if eval_only and not cfg.DATASETS.TEST:
        raise UserError("nothing to evaluate on: give --test-data SPEC.")
    notes = []
    train: list[str] = []
    if not eval_only or not cfg.DATASETS.CLASSES:
        train = _register_training(cfg)
        own = [name for name in train if dataset_report(name)]
        if own:
            cfg.DATASETS.CLASSES = _own_classes(cfg, own[0])
    classes = _classes(cfg, train)
    test = [_register(cfg, spec, classes) for spec in cfg.DATASETS.TEST]
    for title, names in (("train", train), ("test", test)):
        for name in names:
            report = dataset_report(name)
            if report is None and (title == "test" or not eval_only):
                _check_builtin(name)
            said = report.summary() if report else name
            notes += [f"{title:<10} {line}" for line in said.splitlines()]
    if not cfg.DATASETS.TEST:
        notes.append("test       no --test-data: the run will not be evaluated")
    if train and cfg.DATASETS.LABEL_SHARE != 1:
        notes.append(
            f"labels     {100 * cfg.DATASETS.LABEL_SHARE:g} % of the training images, the same in "
            "every run"
        )
    _settle_classes(cfg, explicit, classes)
    return notes + _settle_masks(cfg, explicit, train) + _settle_keypoints(cfg, train)


def with_registered_data(cfg: CfgNode, eval_only: bool) -> CfgNode:
    """A copy whose data sets are names in this process's catalog, instead of specs."""
    named = cfg.clone()
    named.defrost()
    classes = _classes(cfg)
    if not eval_only:
        share, seed = cfg.DATASETS.LABEL_SHARE, cfg.DATASETS.LABEL_SEED
        names = [_register(cfg, spec, classes) for spec in cfg.DATASETS.TRAIN]
        named.DATASETS.TRAIN = tuple(register_label_share(name, share, seed) for name in names)
    named.DATASETS.TEST = tuple(_register(cfg, spec, classes) for spec in cfg.DATASETS.TEST)
    named.freeze()
    return named


def _register(cfg: CfgNode, spec: str, classes: Sequence[str] | None) -> str:
    """A name in the catalog for a spec or a name, of the kind that the model needs."""
    semantic = is_semantic_model(cfg)
    if not semantic and not is_semantic(spec):
        return register_detection(spec, classes, strict=cfg.DATASETS.STRICT)
    if semantic and is_semantic(spec):
        return register_semantic(spec, classes, strict=cfg.DATASETS.STRICT)
    if not semantic:
        raise UserError(f"{spec} has no objects: {cfg.PROTOCOL or 'this model'} detects objects.")
    if spec not in DatasetCatalog:
        near = difflib.get_close_matches(spec, DatasetCatalog.list(), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"'{spec}' is no data set of pixel labels{hint}: write semseg:IMAGES:LABELS or a name "
            "that Detectron2 knows."
        )
    known = MetadataCatalog.get(spec).get("stuff_classes")
    if known is None or (classes is not None and list(known) != list(classes)):
        why = "has no pixel labels" if known is None else "has other classes than the training set"
        raise UserError(f"{spec} {why}: give data that have.")
    return spec


def _settle_classes(cfg: CfgNode, explicit: Sequence[str], classes: Sequence[str] | None) -> None:
    """The data's number of classes into the head."""
    section = "SEM_SEG_HEAD" if is_semantic_model(cfg) else "ROI_HEADS"
    head = cfg.MODEL[section]
    if not classes or len(classes) == head.NUM_CLASSES:
        return
    key = f"MODEL.{section}.NUM_CLASSES"
    if key in explicit:
        raise UserError(
            f"{key} is set to {head.NUM_CLASSES}, but the data have "
            f"{counted(len(classes), 'class')}: leave it out."
        )
    head.NUM_CLASSES = len(classes)


def _settle_masks(cfg: CfgNode, explicit: Sequence[str], train: Sequence[str]) -> list[str]:
    own = [MetadataCatalog.get(name) for name in train if dataset_report(name)]
    if not own or not cfg.MODEL.MASK_ON:
        return []
    if not all(metadata.has_masks for metadata in own):
        if "MODEL.MASK_ON" in explicit:
            raise UserError("MODEL.MASK_ON is set, but the training data have no masks.")
        cfg.MODEL.MASK_ON = False
        return ["masks      off: the training data have boxes only"]
    cfg.INPUT.MASK_FORMAT = own[0].mask_format
    return [f"masks      on, {own[0].mask_format}"]


def _settle_keypoints(cfg: CfgNode, train: Sequence[str]) -> list[str]:
    own = [name for name in train if dataset_report(name)]
    if not own or not cfg.MODEL.KEYPOINT_ON:
        return []
    names = [list(MetadataCatalog.get(name).get("keypoint_names") or []) for name in own]
    if not all(names) or any(other != names[0] for other in names):
        found = "no keypoints" if not all(names) else "different keypoints"
        raise UserError(f"MODEL.KEYPOINT_ON is set, but the training data have {found}.")
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(names[0])
    pairs = len(MetadataCatalog.get(own[0]).keypoint_flip_map)
    return [f"keypoints  {len(names[0])}, of which a flip swaps {counted(pairs, 'pair')}"]


def _own_classes(cfg: CfgNode, name: str) -> list[str]:
    key = "stuff_classes" if is_semantic_model(cfg) else "thing_classes"
    return list(MetadataCatalog.get(name).get(key, ()))


def _classes(cfg: CfgNode, train: Sequence[str] = ()) -> list[str] | None:
    """Class names in the order of the classifier: own data's, else the training set's."""
    known = list(cfg.DATASETS.CLASSES)
    for name in train:
        known = known or _own_classes(cfg, name)
    return known or None


def _register_training(cfg: CfgNode) -> list[str]:
    """Register the training sets with one list of classes: the config's, or all they have."""
    known = _classes(cfg)
    names = [_register(cfg, spec, known) for spec in cfg.DATASETS.TRAIN]
    lists = [_classes(cfg, [name]) or [] for name in names]
    if known is None and any(found != lists[0] for found in lists):
        union = list(dict.fromkeys(name for found in lists for name in found))
        names = [_register(cfg, spec, union) for spec in cfg.DATASETS.TRAIN]
    return names


def _check_builtin(name: str) -> None:
    """Detectron2's data sets are found below ``DETECTRON2_DATASETS``: say so before the run."""
    metadata = MetadataCatalog.get(name)
    for key in ("json_file", "dirname", "image_root", "image_dir", "gt_dir"):
        path = metadata.get(key)
        if path and "://" not in path and not Path(path).exists():
            raise UserError(
                f"{name} is not on this machine ({path} is missing): set DETECTRON2_DATASETS to "
                "the folder that holds it, or give your own data with --train-data and --test-data."
            )
    packages, mend = NEEDED.get(metadata.get("evaluator_type"), ((), ""))
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{name} needs {' and '.join(missing)}: {mend}.")
