"""From a command line to a plan: everything that can be settled, and refused, before training."""

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .datasets import dataset_report, register
from .errors import UserError
from .protocols import deviations, load_config, split_name, stated_keys
from .scaling import scale_schedule
from .weights import apply_settings, holds_detector, read_backbone


@dataclass(frozen=True)
class Options:
    """What the command line of ``train_net`` says; see its help."""

    config: str | None = None
    train_data: Sequence[str] = ()
    test_data: str | None = None
    num_gpus: int = 1
    eval_only: bool = False
    resume: bool = False
    trials: int | None = None
    output_dir: str | None = None
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Plan:
    """A resolved run, small enough to be sent to every process."""

    cfg: CfgNode
    notes: list[str] = field(default_factory=list)
    eval_only: bool = False
    resume: bool = False
    explicit: tuple[str, ...] = ()


def prepare(options: Options) -> Plan:
    """Resolve everything that can be known before training: config, architecture, data, schedule.

    Raises:
        UserError: any contradiction or missing thing.
    """
    output_dir = Path(options.output_dir) if options.output_dir else None
    own = output_dir / "config.yaml" if output_dir else None
    name = options.config
    if name is None:
        if not (own and own.is_file() and (options.resume or options.eval_only)):
            missing = (
                f" ({own} is missing)" if own and (options.resume or options.eval_only) else ""
            )
            raise UserError(
                f"name a protocol or a file with --config, such as --config VOC{missing}."
            )
        name = str(own)
    reference = load_config(name)
    own_config = own is not None and Path(name) == own
    cfg = load_config(name, options.overrides)
    explicit = list(options.overrides[::2])
    if output_dir:
        cfg.OUTPUT_DIR = str(output_dir)
    if not options.eval_only and options.trials is None:
        _check_output_dir(Path(cfg.OUTPUT_DIR), options.resume)
    world_size = int(os.environ["WORLD_SIZE"]) if under_torchrun() else options.num_gpus
    source = "" if name == cfg.PROTOCOL else f" (from {name})"
    notes = [f"protocol   {cfg.PROTOCOL or 'none'}{source}"]
    notes += _settle_device(cfg, explicit, world_size)
    if not own_config:  # a run's own config is settled
        notes += _settle_weights(cfg, [*explicit, *stated_keys(name)], options.eval_only)
    notes += _settle_data(cfg, explicit, options)
    cfg, scaled = scale_schedule(cfg, reference, explicit, world_size)
    notes += _wrapped("scaled", scaled)
    notes += _check_solver(cfg, world_size)
    notes += _wrapped("deviates", [line for line in deviations(cfg) if line not in scaled])
    return Plan(cfg, notes, options.eval_only, options.resume, tuple(explicit))


def trials(plan: Plan, count: int | None) -> list[Plan]:
    """The run itself, or ``count`` of them: seeds SEED, SEED + 1, ... into ``trial_0``, ...

    With ``--resume``, finished trials are left out.
    """
    if count is None:
        return [plan]
    if count < 1:
        raise UserError(f"--trials must be at least 1, not {count}.")
    plans = []
    for k in range(count):
        cfg = plan.cfg.clone()
        cfg.SEED += k
        cfg.OUTPUT_DIR = str(Path(plan.cfg.OUTPUT_DIR, f"trial_{k}"))
        if plan.resume and Path(cfg.OUTPUT_DIR, "results.json").is_file() and not plan.eval_only:
            continue
        if not plan.eval_only:
            _check_output_dir(Path(cfg.OUTPUT_DIR), plan.resume)
        head = [f"trial      {k + 1} of {count}, seed {cfg.SEED}"]
        plans.append(replace(plan, cfg=cfg, notes=head + plan.notes))
    return plans


def with_registered_data(cfg: CfgNode, eval_only: bool) -> CfgNode:
    """A copy whose data sets are names in this process's catalog, instead of specs."""
    named = cfg.clone()
    named.defrost()
    classes = _classes(cfg)
    if not eval_only:
        named.DATASETS.TRAIN = tuple(register(spec, classes) for spec in cfg.DATASETS.TRAIN)
    named.DATASETS.TEST = tuple(register(spec, classes) for spec in cfg.DATASETS.TEST)
    named.freeze()
    return named


def _wrapped(title: str, changes: Sequence[str]) -> list[str]:
    """Changes as lines of a readable length under one title."""
    text = ", ".join(change.replace(" ", "\xa0") for change in changes)  # break between them only
    lines = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return [f"{title:<10} {line}".replace("\xa0", " ") for line in lines]


def _settle_device(cfg: CfgNode, explicit: Sequence[str], world_size: int) -> list[str]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if "MODEL.DEVICE" not in explicit:
        cfg.MODEL.DEVICE = "cuda" if gpus else "cpu"
    elif cfg.MODEL.DEVICE.startswith("cuda") and not gpus:
        raise UserError("MODEL.DEVICE is cuda, but torch sees no GPU here: set it to cpu.")
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else world_size
    if gpus and local > gpus:
        raise UserError(f"--num-gpus {local}, but this machine has {gpus}.")
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        raise UserError("SOLVER.AMP.ENABLED needs a GPU: leave it out on a CPU.")
    processes = "one process" if world_size == 1 else f"{world_size} processes"
    return [f"device     {cfg.MODEL.DEVICE}, {processes}"]


def _settle_weights(cfg: CfgNode, explicit: Sequence[str], eval_only: bool) -> list[str]:
    """Architecture and pixel statistics from the weights; start and weights must agree."""
    base, start = split_name(cfg.PROTOCOL)
    path, like = cfg.MODEL.WEIGHTS, cfg.MODEL.ARCHITECTURE_FROM
    if not eval_only and cfg.PROTOCOL:
        if start == "random" and path:
            raise UserError(
                f"{cfg.PROTOCOL} starts from random weights, but MODEL.WEIGHTS is {path}: use "
                f"{base}, or MODEL.ARCHITECTURE_FROM for the same network without its weights."
            )
        if start != "random" and not path:
            raise UserError(
                f"{cfg.PROTOCOL} starts from pre-trained weights: give MODEL.WEIGHTS FILE (from "
                f"tools/convert.py), or use {base}-random."
            )
    if like and path:
        raise UserError(
            "MODEL.ARCHITECTURE_FROM is for random weights: with MODEL.WEIGHTS leave it out."
        )
    source = like or path
    if not source or holds_detector(source):
        return []
    weights = read_backbone(source)
    taken = apply_settings(cfg, weights, explicit)
    said = [f"weights    {source}" + (": its architecture, not its values" if like else "")]
    if "MODEL.PIXEL_MEAN" not in weights.settings:
        said.append(
            f"weights    no pixel statistics in the file: the protocol's {cfg.INPUT.FORMAT}"
        )
    return said + _wrapped("taken", taken)


def _settle_data(cfg: CfgNode, explicit: Sequence[str], options: Options) -> list[str]:
    """Own data into the config: specs, classes, masks. Everything is read and checked here."""
    if options.train_data:
        cfg.DATASETS.TRAIN = tuple(options.train_data)
        cfg.DATASETS.CLASSES = []
        if not options.test_data:
            cfg.DATASETS.TEST = ()
    if options.test_data:
        cfg.DATASETS.TEST = (options.test_data,)
    if len(cfg.DATASETS.TEST) > 1:
        raise UserError(f"one run has one test set, not {', '.join(cfg.DATASETS.TEST)}.")
    if options.eval_only and not cfg.DATASETS.TEST:
        raise UserError("nothing to evaluate on: give --test-data SPEC.")
    notes = []
    train: list[str] = []
    if not options.eval_only or not cfg.DATASETS.CLASSES:
        train = _register_training(cfg)
        own = [name for name in train if dataset_report(name)]
        if own:
            cfg.DATASETS.CLASSES = list(MetadataCatalog.get(own[0]).thing_classes)
    classes = _classes(cfg, train)
    test = [register(spec, classes) for spec in cfg.DATASETS.TEST]
    for title, names in (("train", train), ("test", test)):
        for name in names:
            report = dataset_report(name)
            if report is None and (title == "test" or not options.eval_only):
                _check_builtin(name)
            said = report.summary() if report else name
            notes += [f"{title:<10} {line}" for line in said.splitlines()]
    if not cfg.DATASETS.TEST:
        notes.append("test       no --test-data: the run will not be evaluated")
    if classes and len(classes) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        if "MODEL.ROI_HEADS.NUM_CLASSES" in explicit:
            raise UserError(
                f"MODEL.ROI_HEADS.NUM_CLASSES is set to {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, but the "
                f"data have {len(classes)} classes: leave it out."
            )
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(classes)
    return notes + _settle_masks(cfg, explicit, train)


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


def _classes(cfg: CfgNode, train: Sequence[str] = ()) -> list[str] | None:
    """Class names in the order of the classifier: own data's, else the training set's."""
    known = list(cfg.DATASETS.CLASSES)
    for name in train:
        known = known or list(MetadataCatalog.get(name).get("thing_classes", ()))
    return known or None


def _register_training(cfg: CfgNode) -> list[str]:
    """Register the training sets with one list of classes: the config's, or all they have."""
    known = _classes(cfg)
    names = [register(spec, known) for spec in cfg.DATASETS.TRAIN]
    lists = [_classes(cfg, [name]) or [] for name in names]
    if known is None and any(found != lists[0] for found in lists):
        union = list(dict.fromkeys(name for found in lists for name in found))
        names = [register(spec, union) for spec in cfg.DATASETS.TRAIN]
    return names


def _check_builtin(name: str) -> None:
    """Detectron2's data sets are found below ``DETECTRON2_DATASETS``: say so before the run."""
    metadata = MetadataCatalog.get(name)
    for key in ("json_file", "dirname", "image_root"):
        path = metadata.get(key)
        if path and "://" not in path and not Path(path).exists():
            raise UserError(
                f"{name} is not on this machine ({path} is missing): set DETECTRON2_DATASETS to "
                "the folder that holds it, or give your own data with --train-data and --test-data."
            )


def _check_solver(cfg: CfgNode, world_size: int) -> list[str]:
    solver = cfg.SOLVER
    if solver.IMS_PER_BATCH < 1 or solver.IMS_PER_BATCH % world_size:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} cannot be shared by {world_size} "
            "processes: make it a multiple."
        )
    if solver.MAX_ITER < 1:
        raise UserError(f"SOLVER.MAX_ITER must be at least 1, not {solver.MAX_ITER}.")
    if world_size == solver.IMS_PER_BATCH and cfg.MODEL.RESNETS.NORM == "BN":
        return ["norms      one image a process: its BN sees one image"]
    return []


def _check_output_dir(directory: Path, resume: bool) -> None:
    """Refuse a folder with another run in it; what a failed start leaves (its log) is no run."""
    if resume or not _is_first() or not directory.is_dir():
        return
    if any(not entry.name.startswith((".", "log.txt")) for entry in directory.iterdir()):
        finished = "a finished run" if (directory / "results.json").is_file() else "files already"
        raise UserError(
            f"{directory} holds {finished}: choose another --output-dir, or go on with --resume."
        )


def under_torchrun() -> bool:
    """Whether ``torchrun`` has started this process (as one of several) and named it."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= os.environ.keys()


def _is_first() -> bool:
    return not under_torchrun() or os.environ["RANK"] == "0"
