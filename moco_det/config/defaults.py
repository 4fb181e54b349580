"""Config keys: this project's additions to Detectron2's, and validation of keys and values."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco_common.errors import UserError

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# Names of the types of default values, for messages.
KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
}


def add_moco_det_config(cfg: CfgNode) -> None:
    """Add this project's keys to a Detectron2 config, in place."""
    # Name of the protocol that the run follows ("VOC", "COCO-FPN-1x-random"); set by load_config.
    cfg.PROTOCOL = ""
    # Source of the protocol (paper, section), and settings that it does not confirm.
    cfg.SOURCE = ""
    # Converted file that gives the model its architecture and pixel statistics, but no weights: for
    # a baseline of random weights in the same network.
    cfg.MODEL.ARCHITECTURE_FROM = ""
    # Class names of custom data, in the order of the classifier; empty for Detectron2's data sets.
    cfg.DATASETS.CLASSES = []
    # Share of the training images that is used, in (0, 1]. The subset is stratified by class, is
    # contained in those of larger shares, and does not depend on SEED.
    cfg.DATASETS.LABEL_SHARE = 1.0
    # Seed of the subset of LABEL_SHARE.
    cfg.DATASETS.LABEL_SEED = 0
    # Treat problems in custom data as errors instead of reporting them.
    cfg.DATASETS.STRICT = False
    # Range of the random scale, relative to the image, before INPUT.CROP (semantic segmentation).
    cfg.INPUT.SCALE_TRAIN = []
    # Large-scale jitter: side of the square that images are scaled for and cropped or padded to; 0
    # for resizing by MIN_SIZE_TRAIN.
    cfg.INPUT.JITTER_SIZE = 0
    # Large-scale jitter: range of the random scale, relative to JITTER_SIZE.
    cfg.INPUT.JITTER_RANGE = [0.1, 2.0]
    # Channels of the 3x3 convolution after a dilated res5 (build_resnet_dc5_backbone).
    cfg.MODEL.DC5_CHANNELS = 512
    # FCNHead: number of 3x3 convolutions before the classifier.
    cfg.MODEL.SEM_SEG_HEAD.NUM_CONV = 2
    # FCNHead: dilation of its 3x3 convolutions.
    cfg.MODEL.SEM_SEG_HEAD.DILATION = 6
    # Number of forward and backward passes per optimisation step, each with IMS_PER_BATCH /
    # (processes * ACCUMULATION_STEPS) images. Equivalent to that many times more processes, except
    # that BN sees one pass at a time.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Precision with SOLVER.AMP.ENABLED: "float16" (Detectron2's, GPU only) or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"
    # Factors of the learning rate for stem, res2, res3, res4 and res5, such as [0.1, 0.1, 0.3, 0.3,
    # 1.0]; empty for the same rate everywhere. The log shows the rate of the largest group.
    cfg.SOLVER.STAGE_LR_FACTORS = []
    # Decay of an exponential moving average of the weights, such as 0.999; 0 for none. The average
    # is evaluated beside the weights (bbox_ema) and written to model_ema.pth. It needs the memory
    # of one more model.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Metric whose best evaluation is kept as model_best.pth, such as "bbox/AP" or "bbox_ema/AP";
    # empty for none. See TEST.EVAL_PERIOD.
    cfg.TEST.BEST_METRIC = ""
    # Number of evaluations without a better TEST.BEST_METRIC after which training stops; 0 for
    # never.
    cfg.TEST.PATIENCE = 0
    # Use the channels-last memory format for weights and activations, which is often faster.
    cfg.SOLVER.CHANNELS_LAST = False
    # Trial of the largest batch before training: "auto" (on a GPU), "always", "only" (then stop) or
    # "never".
    cfg.PREFLIGHT = "auto"
    # Number of iterations between two progress lines (and two lines of metrics.json).
    cfg.LOG_PERIOD = 20
    # Experiment trackers that get the scalars too: "wandb", "mlflow". Set by --log.
    cfg.TRACKERS = []
    # Seed of the run. A negative one, Detectron2's default, would be replaced by the clock's.
    cfg.SEED = 1
    # Number of data-loading workers per process; on few cores, they compete with the training.
    cfg.DATALOADER.NUM_WORKERS = 2


def default_config() -> CfgNode:
    """Return Detectron2's defaults with this project's keys added."""
    from detectron2.config import get_cfg  # takes seconds, and no key check needs it

    cfg = get_cfg()
    add_moco_det_config(cfg)
    return cfg


@cache
def key_names() -> tuple[str, ...]:
    """Return the names of all keys, read from Detectron2's source: importing it takes seconds."""
    package = find_spec("detectron2")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).with_name("config") / "defaults.py"
    detectron2s = _assigned(source.read_text(encoding="utf-8"), "_C")
    return tuple(
        dict.fromkeys([*detectron2s, *_assigned(inspect.getsource(add_moco_det_config), "cfg")])
    )


def _assigned(source: str, root: str) -> Iterator[str]:
    """Yield the keys that source code assigns to a root.

    ``_C.MODEL.DEVICE = "cuda"`` gives MODEL.DEVICE, and ``_C.SOLVER.AMP = CN({"ENABLED": False})``
    gives SOLVER.AMP.ENABLED.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign):
            continue
        name, value = ast.unparse(node.targets[0]), node.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "CN":
            names = [f"{name}.{key}" for section in value.args for key in ast.literal_eval(section)]
        else:
            names = [name]
        yield from (key.removeprefix(f"{root}.") for key in names if key.startswith(f"{root}."))


def check_pairs(overrides: Sequence[str]) -> None:
    """Check that overrides come in pairs of known keys and values.

    Raises:
        UserError: a key without a value, or an unknown key.
    """
    if len(overrides) % 2:
        raise UserError(
            f"overrides are KEY VALUE pairs, but {overrides[-1]!r} has no partner: write pairs "
            f"such as `SOLVER.IMS_PER_BATCH 8`."
        )
    check_keys(overrides[::2], where="the command line")


def apply_overrides(cfg: CfgNode, overrides: Sequence[str]) -> list[str]:
    """Apply ``[KEY, VALUE, KEY, VALUE, ...]`` in place; return the keys.

    Raises:
        UserError: a key without a value, an unknown key, or a value of the wrong type.
    """
    check_pairs(overrides)
    keys = list(overrides[::2])
    for key, value in zip(keys, overrides[1::2], strict=True):
        was = flatten(cfg)[key]
        if isinstance(was, float) and value.lstrip("+-").isdigit():
            value += ".0"  # yacs accepts no int for a float: WEIGHT_DECAY 0
        try:
            cfg.merge_from_list([key, value])
        except (ValueError, AssertionError) as error:
            raise UserError(f"{_wrong(key, was, value)}.") from error
    return keys


def flatten(cfg: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten ``{"SOLVER": {"BASE_LR": 0.02}}`` to ``{"SOLVER.BASE_LR": 0.02}``."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def check_keys(keys: Iterable[str], where: str, lines: Mapping[str, int] | None = None) -> None:
    """Raise ``UserError`` for an unknown key, with the nearest known keys and its line."""
    known = key_names()
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
            leaf = key.rpartition(".")[2]
            near += [k for k in known if k.rpartition(".")[2] == leaf and k not in near][:3]
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            at = f", line {lines[key]}" if lines and key in lines else ""
            raise UserError(f"unknown key {key!r} in {where}{at}{hint}.")


def check_values(nested: dict[str, Any], where: str, lines: Mapping[str, int]) -> dict[str, Any]:
    """Check the types of values; return them with integers converted for float keys.

    Raises:
        UserError: a value has the wrong type; the message gives its line.
    """
    default = flatten(default_config())

    def settle(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        settled: dict[str, Any] = {}
        for leaf, value in values.items():
            key = f"{prefix}{leaf}"
            if isinstance(value, Mapping) and key not in default:
                settled[leaf] = settle(value, f"{key}.")
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            settled[leaf] = float(value) if whole and isinstance(default[key], float) else value
            _try(key, settled[leaf], default[key], f"{where}, line {lines.get(key, 1)}")
            if not _is_alike(settled[leaf], default[key], text=key.startswith("DATASETS.")):
                line = lines.get(key, 1)
                raise UserError(f"{where}, line {line}: {_wrong(key, default[key], value)}.")
        return settled

    return settle(nested, "")


def _try(key: str, value: Any, was: Any, where: str) -> None:
    """Raise `UserError` if yacs does not accept a value for a key."""
    from detectron2.config import CfgNode

    node = CfgNode({"KEY": was})
    try:
        node.merge_from_other_cfg(CfgNode({"KEY": value}))
    except (ValueError, AssertionError, KeyError) as error:
        raise UserError(f"{where}: {_wrong(key, was, value)}.") from error


def _is_alike(value: Any, was: Any, text: bool) -> bool:
    """Return True if numbers are finite, and the parts of a list of the kinds that it has by
    default, or ``text``; yacs compares the types of whole values only."""
    if isinstance(value, float):
        return math.isfinite(value)
    if value is None:
        return was is None
    if not isinstance(value, (list, tuple)) or not isinstance(was, (list, tuple)):
        return True
    kinds = {str} if text and not was else set(map(_kind, was))
    return not kinds or all(_kind(part) in kinds and _is_alike(part, 0, text) for part in value)


def _kind(value: Any) -> type:
    return next((k for k in (bool, str, Mapping, Sequence) if isinstance(value, k)), float)


def _wrong(key: str, was: Any, value: Any) -> str:
    such = "" if isinstance(was, bool) else f" such as {_plain(was)!r}"
    return f"{key} takes {KINDS.get(type(was), type(was).__name__)}{such}, not {value!r}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


SEMANTIC = "SemanticSegmentor"


def is_semantic_model(cfg: CfgNode) -> bool:
    """Return True if the model does semantic segmentation rather than detection."""
    return bool(cfg.MODEL.META_ARCHITECTURE == SEMANTIC)
