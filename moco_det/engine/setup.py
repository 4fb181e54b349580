"""Resolution of a command line into a plan; what is wrong is refused before training starts."""

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from detectron2.config import CfgNode

from moco_common import comm, run_lock
from moco_common.backbone.resnet import has_bottlenecks
from moco_common.errors import UserError
from moco_common.launch import check_processes, planned_ranks, restarted, under_torchrun
from moco_common.progress import silent
from moco_det.checkpoint.backbone_weights import apply_settings, check_norm, read_backbone
from moco_det.checkpoint.detector_weights import holds_detector
from moco_det.checkpoint.run_checkpointer import newest_checkpoints
from moco_det.config.key_descriptions import explanation
from moco_det.config.protocols import GROUP_NORM, deviations, load_config, split_name, stated_keys
from moco_det.config.schedule_scaling import scale_schedule
from moco_det.data.build import settle_data
from moco_det.data.check_images import check_images
from moco_det.data.samplers import share
from moco_det.engine.optimizer import check_factors
from moco_det.engine.resume import compare_config
from moco_det.engine.selection import check_selection
from moco_det.engine.trackers import check_trackers
from moco_det.engine.train_step import precision
from moco_det.modeling.detector import STAGES

__all__ = ["Options", "Plan", "prepare", "trials", "uses_gpus"]


@dataclass(frozen=True)
class Options:
    """Options of ``train_net``; see its help."""

    config: str | None = None
    train_data: Sequence[str] = ()
    test_data: str | None = None
    num_gpus: int = 1
    eval_only: bool = False
    resume: bool = False
    trials: int | None = None
    output_dir: str | None = None
    overrides: Sequence[str] = ()
    trial: int | None = None
    strict: bool = False
    explain: str | None = None  # a key, "" for the whole run, None to train
    quiet: bool = False  # print warnings only
    check_images: bool = False  # decode all images first


@dataclass(frozen=True)
class Plan:
    """A resolved run, small enough to be passed to every process."""

    cfg: CfgNode
    notes: list[str] = field(default_factory=list)
    eval_only: bool = False
    resume: bool = False
    explicit: tuple[str, ...] = ()
    explanation: tuple[str, ...] = ()
    quiet: bool = False


def prepare(options: Options) -> Plan:
    """Resolve config, architecture, data and schedule, and register the data sets.

    With ``explain``, weights and data may be missing.

    Raises:
        UserError: an option, file or data set is missing, or two settings contradict each other.
    """
    explaining = options.explain is not None
    output_dir = _output_dir(options)
    if options.trials is not None and options.trials < 1:
        raise UserError(f"--trials must be at least 1, not {options.trials}.")
    own = output_dir / "config.yaml" if output_dir else None
    name = options.config or _config_of_run(own, options)
    reference = load_config(name)
    own_config = own is not None and Path(name) == own
    cfg = load_config(name, options.overrides)
    explicit = list(options.overrides[::2])
    if output_dir:
        cfg.OUTPUT_DIR = str(output_dir)
    if options.strict:
        cfg.DATASETS.STRICT = True
    resume = options.resume or restarted()
    # Under torchrun the ranks first agree on whether the run was restarted; `trials` checks then.
    early = options.trials is None and not under_torchrun()
    if not explaining and not options.eval_only and early:
        _check_output_dir(Path(cfg.OUTPUT_DIR), resume)
    if not explaining:
        _check_writable(Path(cfg.OUTPUT_DIR), options.eval_only)
        check_processes(options.num_gpus, uses_gpus(options))
    world_size = planned_ranks(options.num_gpus)
    source = "" if name == cfg.PROTOCOL else f" (from {name})"
    notes = [f"protocol   {cfg.PROTOCOL or 'none'}{source}"]
    if options.trial is not None:
        cfg.SEED += 0 if own_config else options.trial
        notes.insert(0, f"trial      {options.trial}, seed {cfg.SEED}")
    notes += _settle_device(cfg, explicit, world_size)
    if own_config:
        _refuse_remote_weights(cfg, name, explicit)
    else:  # the config in a run directory is already resolved
        if not explaining and not options.eval_only:
            _check_start(cfg)
        stated = [*explicit, *stated_keys(name)]
        notes += _settle_weights(cfg, stated)
        _check_frozen(cfg, stated)
    _check_dilation(cfg)
    if not explaining or options.train_data or options.test_data:
        notes += settle_data(
            cfg, explicit, options.train_data, options.test_data, options.eval_only
        )
    if not explaining:
        _check_images(cfg, options)
    cfg, scaled = scale_schedule(cfg, reference, explicit, world_size)
    notes += _wrapped("scaled", scaled)
    _check_solver(cfg, world_size)
    if not options.eval_only:
        check_selection(cfg)
        check_factors(cfg)
        check_trackers(cfg.TRACKERS)
    notes += _wrapped("deviates", [line for line in deviations(cfg) if line not in scaled])
    cfg.freeze()
    return Plan(
        cfg,
        notes,
        options.eval_only,
        resume,
        tuple(explicit),
        tuple(explanation(cfg)),
        options.quiet,
    )


def uses_gpus(options: Options) -> bool:
    """Return False if the command line sets ``MODEL.DEVICE`` to the CPU."""
    settings = dict(zip(options.overrides[::2], options.overrides[1::2], strict=False))
    return not settings.get("MODEL.DEVICE", "cuda").startswith("cpu")


def trials(plan: Plan, count: int | None) -> list[Plan]:
    """Return the run or ``count`` trials of it: seeds SEED, SEED + 1, ... in ``trial_0``, ...

    With ``--resume``, finished trials are skipped.

    Raises:
        UserError: a folder holds another run, or the same run with different settings.
    """
    if count is None:
        return [_checked(plan)]
    plans = []
    for k in range(count):
        cfg = plan.cfg.clone()
        cfg.defrost()
        cfg.SEED += k
        cfg.OUTPUT_DIR = str(Path(plan.cfg.OUTPUT_DIR, f"trial_{k}"))
        cfg.freeze()
        head = [f"trial      {k + 1} of {count}, seed {cfg.SEED}"]
        trial = _checked(replace(plan, cfg=cfg, notes=head + plan.notes))
        finished = plan.resume and Path(cfg.OUTPUT_DIR, "results.json").is_file()
        if not finished or plan.eval_only:
            plans.append(trial)
    return plans


def _checked(plan: Plan) -> Plan:
    """Check a run's directory, and note which settings have changed if it is resumed."""
    if plan.eval_only:
        return plan
    _check_output_dir(Path(plan.cfg.OUTPUT_DIR), plan.resume)
    changed = compare_config(plan.cfg) if plan.resume else []
    return replace(plan, notes=[*plan.notes, *_wrapped("changed", changed)])


def _wrapped(title: str, changes: Sequence[str]) -> list[str]:
    """Wrap changes into lines of readable length under one title."""
    text = ", ".join(change.replace(" ", "\xa0") for change in changes)  # break only between them
    lines = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return [f"{title:<10} {line}".replace("\xa0", " ") for line in lines]


def _settle_device(cfg: CfgNode, explicit: Sequence[str], world_size: int) -> list[str]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if "MODEL.DEVICE" not in explicit:
        cfg.MODEL.DEVICE = "cuda" if gpus else "cpu"
    elif cfg.MODEL.DEVICE.startswith("cuda") and not gpus:
        raise UserError("MODEL.DEVICE is cuda, but torch sees no GPU here: set it to cpu.")
    processes = "one process" if world_size == 1 else f"{world_size} processes"
    return [f"device     {cfg.MODEL.DEVICE}, {processes}"]


def _output_dir(options: Options) -> Path | None:
    """Return the run directory; that of a single trial is below the one on the command line."""
    if options.trial is None:
        return Path(options.output_dir) if options.output_dir else None
    if options.trials is not None:
        raise UserError("--trial and --trials exclude each other: pass one of the two.")
    if options.trial < 0:
        raise UserError(f"--trial must be at least 0, not {options.trial}.")
    if not options.output_dir:
        raise UserError("--trial K needs --output-dir DIR, the parent of its folder trial_K.")
    return Path(options.output_dir, f"trial_{options.trial}")


def _config_of_run(own: Path | None, options: Options) -> str:
    """Return the config of an existing run, to resume or evaluate it."""
    continued = options.resume or options.eval_only
    if own and own.is_file() and (continued or options.explain is not None):
        return str(own)
    missing = f" ({own} is missing)" if own and continued else ""
    raise UserError(f"name a protocol or a file with --config, such as --config VOC{missing}.")


def _check_frozen(cfg: CfgNode, stated: Sequence[str]) -> None:
    """Check that layers are frozen by intent only, and that what they hold is worth keeping."""
    key, count = "MODEL.BACKBONE.FREEZE_AT", cfg.MODEL.BACKBONE.FREEZE_AT
    last = cfg.MODEL.RESNETS.OUT_FEATURES[-1]
    most = STAGES.index(last) + 1 if last in STAGES else len(STAGES)
    if not 0 <= count <= most:
        raise UserError(f"{key} is {count}: this backbone has {most} stages to freeze.")
    if count and key not in stated:
        raise UserError(
            f"{key} is {count}, Detectron2's default, but fine-tuning here trains every layer: set "
            "it to 0, or state it to freeze the first stages."
        )
    if count and not cfg.MODEL.WEIGHTS:
        raise UserError(
            f"{key} is {count}, but the run starts from random weights, which would stay random: "
            "set it to 0."
        )


def _check_start(cfg: CfgNode) -> None:
    """Check that weights are given if, and only if, the protocol starts from weights."""
    base, start = split_name(cfg.PROTOCOL)
    path = cfg.MODEL.WEIGHTS
    if cfg.PROTOCOL and start == "random" and path:
        raise UserError(
            f"{cfg.PROTOCOL} starts from random weights, but MODEL.WEIGHTS is {path}: use "
            f"{base}, or MODEL.ARCHITECTURE_FROM for the same network without its weights."
        )
    if cfg.PROTOCOL and start != "random" and not path:
        raise UserError(
            f"{cfg.PROTOCOL} starts from pre-trained weights: add MODEL.WEIGHTS FILE (written by "
            f"tools/convert.py) to the command, or use {base}-random."
        )


def _check_dilation(cfg: CfgNode) -> None:
    depth = cfg.MODEL.RESNETS.DEPTH
    if cfg.MODEL.RESNETS.RES5_DILATION != 1 and not has_bottlenecks(depth):
        raise UserError(
            f"{cfg.PROTOCOL or 'this config'} dilates res5, which Detectron2 cannot do for a "
            f"ResNet-{depth}: use a C4 or FPN protocol, or a ResNet-50 or deeper."
        )


def _refuse_remote_weights(cfg: CfgNode, name: str, explicit: Sequence[str]) -> None:
    """Refuse to fetch weights from an address that the config of a run directory names."""
    path = cfg.MODEL.WEIGHTS
    remote = "://" in path and not path.startswith("detectron2://")
    if remote and "MODEL.WEIGHTS" not in explicit and not newest_checkpoints(cfg.OUTPUT_DIR):
        raise UserError(
            f"{name} names {path} as MODEL.WEIGHTS, and what a run directory names is not fetched "
            "without your word: pass MODEL.WEIGHTS on the command line."
        )


def _settle_weights(cfg: CfgNode, explicit: Sequence[str]) -> list[str]:
    """Take architecture and pixel statistics from the weights; return notes for the log."""
    path, like = cfg.MODEL.WEIGHTS, cfg.MODEL.ARCHITECTURE_FROM
    if like and path:
        raise UserError(
            "MODEL.ARCHITECTURE_FROM and MODEL.WEIGHTS exclude each other: remove the first to "
            "start from the weights, the second to start from random ones."
        )
    source = like or path
    if not source or holds_detector(source):
        return []
    weights = read_backbone(source)
    if path:
        check_norm(cfg.MODEL.RESNETS.NORM == GROUP_NORM, weights)
    taken = apply_settings(cfg, weights, explicit)
    notes = [f"weights    {source}" + (" (architecture only)" if like else "")]
    if "MODEL.PIXEL_MEAN" not in weights.settings:
        notes.append(
            "weights    no pixel statistics in the file: using the protocol's, in "
            f"{cfg.INPUT.FORMAT} order"
        )
    return notes + _wrapped("taken", taken)


def _check_solver(cfg: CfgNode, world_size: int) -> None:
    solver = cfg.SOLVER
    share(cfg, world_size)
    precision(cfg)
    if solver.MAX_ITER < 1:
        raise UserError(f"SOLVER.MAX_ITER must be at least 1, not {solver.MAX_ITER}.")


def _check_images(cfg: CfgNode, options: Options) -> None:
    """Decode all images if requested; otherwise only look for truncated files in the test set."""
    whole = options.check_images or cfg.PREFLIGHT == "only"
    names = cfg.DATASETS.TEST
    if whole and not options.eval_only:
        names = (*cfg.DATASETS.TRAIN, *names)
    check_images(names, whole=whole, say=silent if options.quiet else print)


def _check_writable(directory: Path, eval_only: bool) -> None:
    """Refuse an output directory that cannot be written before reading any data."""
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return
    reason = f"no permission to write {nearest}" if nearest.is_dir() else f"{nearest} is a file"
    advice = "choose another one"
    if eval_only and nearest == directory:
        advice = (
            f"evaluate with --config {directory}/config.yaml, another --output-dir and "
            f"MODEL.WEIGHTS {directory}/model_final.pth"
        )
    raise UserError(f"--output-dir {directory} cannot be written ({reason}): {advice}.")


def _check_output_dir(directory: Path, resume: bool) -> None:
    """Refuse a directory that holds another run, unless that run ended before training."""
    if resume or comm.rank() > 0 or not directory.is_dir():
        return
    left = (".", "log.txt", "findings.json", run_lock.NAME)
    if any(not entry.name.startswith(left) for entry in directory.iterdir()):
        content = "a finished run" if (directory / "results.json").is_file() else "files"
        raise UserError(
            f"{directory} already holds {content}: choose another --output-dir, or pass --resume."
        )
