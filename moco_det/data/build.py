"""Settle the data of a run: read, check and register its data sets, and adapt the config."""

import difflib
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from moco_common.errors import UserError
from moco_common.text import counted
from moco_det.config.defaults import is_semantic_model
from moco_det.data.catalog import dataset_report
from moco_det.data.datasets.sem_seg import is_semantic
from moco_det.data.datasets.voc import VOCFolder
from moco_det.data.register import OwnData, check_known, is_spec, read

# Packages that some of Detectron2's data sets need, by their evaluator_type.
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
    """Register the data sets of a run and adapt the config to them, in place.

    ``DATASETS`` keeps the specs, which are the names in Detectron2's catalogs. Each file is read
    once.

    Args:
        cfg: the config so far.
        explicit: keys that the user has set.
        train_data, test_data: specs from the command line.
        eval_only: whether the training data are skipped where the config lists their classes.

    Returns:
        Lines about the data for the log.

    Raises:
        UserError: data are missing or unreadable, or not of the kind that the protocol needs.
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
    train = () if eval_only and cfg.DATASETS.CLASSES else cfg.DATASETS.TRAIN
    classes = _register(cfg, train)
    own = [name for name in train if dataset_report(name)]
    if own:
        cfg.DATASETS.CLASSES = list(classes or ())
    notes = []
    for title, names in (("train", train), ("test", cfg.DATASETS.TEST)):
        for name in names:
            report = dataset_report(name)
            if report is None and (title == "test" or not eval_only):
                check_builtin(name)
            said = report.summary() if report else name
            notes += [f"{title:<10} {line}" for line in said.splitlines()]
    notes += _shared_images(train, cfg.DATASETS.TEST)
    if not cfg.DATASETS.TEST:
        notes.append("test       no --test-data: the run will not be evaluated")
    if train and cfg.DATASETS.LABEL_SHARE != 1:
        notes.append(
            f"labels     {100 * cfg.DATASETS.LABEL_SHARE:g} % of the training images, the same in "
            "every run"
        )
    _settle_classes(cfg, explicit, classes)
    return notes + _settle_masks(cfg, explicit, own) + _settle_keypoints(cfg, own)


def _shared_images(train: Sequence[str], test: Sequence[str]) -> list[str]:
    """A warning where own test images are among the training images."""
    files = [
        {record["file_name"] for name in names if dataset_report(name) for record in
         DatasetCatalog.get(name)} for names in (train, test)
    ]  # fmt: skip
    shared = sorted(files[0] & files[1])
    if not shared:
        return []
    return [
        f"data       warning: {len(shared):,} of {counted(len(files[1]), 'test image', ',')} are "
        f"training images too (first: {shared[0]}), so the result says nothing about new images"
    ]


def _register(cfg: CfgNode, train: Sequence[str]) -> list[str] | None:
    """Read and register training sets and the test set, each once, with one list of classes.

    Returns:
        The classes in the order of the classifier: the config's, or all that the training sets
        have. None where none are known.
    """
    voc_folder = functools.cache(VOCFolder)
    data: dict[str, OwnData | None] = {}
    for spec in dict.fromkeys([*train, *cfg.DATASETS.TEST]):
        _check_kind(cfg, spec)
        data[spec] = read(spec, voc_folder)
    found = [own.classes if (own := data[spec]) else _known_classes(cfg, spec) for spec in train]
    union = dict.fromkeys(name for classes in found for name in classes)
    classes = list(cfg.DATASETS.CLASSES or union) or None
    for spec, own in data.items():
        if own is not None:
            own.register(classes, strict=cfg.DATASETS.STRICT, masks=cfg.MODEL.MASK_ON)
        else:
            _check_known(cfg, spec, classes)
    return classes


def _check_kind(cfg: CfgNode, spec: str) -> None:
    """Check that a spec is of the kind that the model needs."""
    semantic = is_semantic_model(cfg)
    if is_semantic(spec) and not semantic:
        raise UserError(f"{spec} has no objects: {cfg.PROTOCOL or 'this model'} detects objects.")
    if semantic and not is_semantic(spec) and (is_spec(spec) or spec not in DatasetCatalog):
        near = difflib.get_close_matches(spec, DatasetCatalog.list(), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"'{spec}' is not a data set of pixel labels{hint}: write semseg:IMAGES:LABELS or a "
            "name that Detectron2 knows."
        )


def _check_known(cfg: CfgNode, name: str, classes: Sequence[str] | None) -> None:
    if not is_semantic_model(cfg):
        check_known(name, classes)
        return
    known = _known_classes(cfg, name)
    if not known or (classes is not None and known != list(classes)):
        why = "has other classes than the training set" if known else "has no pixel labels"
        raise UserError(f"{name} {why}: choose another data set.")


def _settle_classes(cfg: CfgNode, explicit: Sequence[str], classes: Sequence[str] | None) -> None:
    """Set the number of classes of the head to that of the data."""
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


def _settle_masks(cfg: CfgNode, explicit: Sequence[str], own: Sequence[str]) -> list[str]:
    if not own or not cfg.MODEL.MASK_ON:
        return []
    data = [MetadataCatalog.get(name) for name in own]
    if not all(metadata.has_masks for metadata in data):
        if "MODEL.MASK_ON" in explicit:
            raise UserError("MODEL.MASK_ON is set, but the training data have no masks.")
        cfg.MODEL.MASK_ON = False
        return ["masks      off: the training data have boxes only"]
    cfg.INPUT.MASK_FORMAT = data[0].mask_format
    return [f"masks      on, {data[0].mask_format}"]


def _settle_keypoints(cfg: CfgNode, own: Sequence[str]) -> list[str]:
    if not own or not cfg.MODEL.KEYPOINT_ON:
        return []
    names = [list(MetadataCatalog.get(name).get("keypoint_names") or []) for name in own]
    if not all(names) or any(other != names[0] for other in names):
        found = "no keypoints" if not all(names) else "different keypoints"
        raise UserError(f"MODEL.KEYPOINT_ON is set, but the training data have {found}.")
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(names[0])
    pairs = len(MetadataCatalog.get(own[0]).keypoint_flip_map)
    return [f"keypoints  {len(names[0])}, of which a flip swaps {counted(pairs, 'pair')}"]


def _known_classes(cfg: CfgNode, name: str) -> list[str]:
    """The classes of one of Detectron2's data sets, as far as its catalog knows them."""
    key = "stuff_classes" if is_semantic_model(cfg) else "thing_classes"
    return list(MetadataCatalog.get(name).get(key) or ()) if name in DatasetCatalog else []


def check_builtin(name: str) -> None:
    """Check that the files of one of Detectron2's data sets are there.

    Raises:
        UserError: a file, or a package that reads them, is missing.
    """
    metadata = MetadataCatalog.get(name)
    for key in ("json_file", "dirname", "image_root", "image_dir", "gt_dir"):
        path = metadata.get(key)
        if path and "://" not in path and not Path(path).exists():
            raise UserError(
                f"{name} is not on this machine ({path} is missing): set DETECTRON2_DATASETS to "
                "the folder that holds it, or give your own data with --train-data and --test-data."
            )
    packages, fix = NEEDED.get(metadata.get("evaluator_type"), ((), ""))
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{name} needs {' and '.join(missing)}: {fix}.")
