"""The keys of a config: this project's own beside Detectron2's, and what may be set to what."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco_common.errors import UserError

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# What a value is called that is not of the default's type.
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
    # Where a protocol comes from (paper, section), and what in it is not confirmed.
    cfg.SOURCE = ""
    # Converted file whose architecture and pixel statistics the model takes, but not its weights:
    # the way to compare random weights in the very network that given weights have.
    cfg.MODEL.ARCHITECTURE_FROM = ""
    # Class names of own data, in the order of the classifier; empty for Detectron2's data sets.
    cfg.DATASETS.CLASSES = []
    # Share of the training images that is used, in (0, 1]: stratified by class, the smaller inside
    # the larger, and the same for every run's SEED.
    cfg.DATASETS.LABEL_SHARE = 1.0
    # Which of the possible subsets of that share.
    cfg.DATASETS.LABEL_SEED = 0
    # Whether anything wrong in own data is an error instead of an entry in the report.
    cfg.DATASETS.STRICT = False
    # Range of the random scale, relative to the image, before INPUT.CROP: semantic segmentation.
    cfg.INPUT.SCALE_TRAIN = []
    # Channels of the 3x3 convolution behind a dilated res5 (build_resnet_dc5_backbone).
    cfg.MODEL.DC5_CHANNELS = 512
    # FCNHead: 3x3 convolutions before the classifier, and their dilation.
    cfg.MODEL.SEM_SEG_HEAD.NUM_CONV = 2
    cfg.MODEL.SEM_SEG_HEAD.DILATION = 6
    # Forward and backward passes of one optimisation step: each sees IMS_PER_BATCH / (processes *
    # ACCUMULATION_STEPS) images. Equal to as many more processes, but BN sees one pass only.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # With SOLVER.AMP.ENABLED: "float16" (GPU only, Detectron2's) or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"
    # Keep weights and activations channels last in memory: the same numbers, often faster.
    cfg.SOLVER.CHANNELS_LAST = False
    # Whether the worst batch is tried before training: "auto" (on a GPU), "always", "only" (then
    # stop) or "never".
    cfg.PREFLIGHT = "auto"
    # Iterations between two lines of progress (and two lines of metrics.json).
    cfg.LOG_PERIOD = 20
    # Every run is repeatable: a negative seed (Detectron2's default) would draw one from the clock.
    cfg.SEED = 1
    # Data loading competes with the step where there are few cores.
    cfg.DATALOADER.NUM_WORKERS = 2


def default_config() -> CfgNode:
    """Detectron2's defaults and this project's own keys."""
    from detectron2.config import get_cfg  # takes seconds, and no key check needs it

    cfg = get_cfg()
    add_moco_det_config(cfg)
    return cfg


@cache
def key_names() -> tuple[str, ...]:
    """The names of all keys, read from Detectron2's source because importing it takes seconds."""
    package = find_spec("detectron2")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).with_name("config") / "defaults.py"
    detectron2s = _assigned(source.read_text(encoding="utf-8"), "_C")
    return tuple(
        dict.fromkeys([*detectron2s, *_assigned(inspect.getsource(add_moco_det_config), "cfg")])
    )


def _assigned(source: str, root: str) -> Iterator[str]:
    """The keys that a source sets: MODEL.DEVICE by ``_C.MODEL.DEVICE = "cuda"``, and SOLVER.AMP's
    ENABLED by ``_C.SOLVER.AMP = CN({"ENABLED": False})``."""
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
            f"overrides come as KEY VALUE pairs, but {overrides[-1]!r} has no partner in "
            f"'{' '.join(overrides)}'."
        )
    check_keys(overrides[::2], where="the command line")


def apply_overrides(cfg: CfgNode, overrides: Sequence[str]) -> list[str]:
    """Apply ``[KEY, VALUE, KEY, VALUE, ...]`` in place; returns the keys.

    Raises:
        UserError: a key without a value, an unknown key, or a value of the wrong type.
    """
    check_pairs(overrides)
    keys = list(overrides[::2])
    for key, value in zip(keys, overrides[1::2], strict=True):
        was = flatten(cfg)[key]
        if isinstance(was, float) and value.lstrip("+-").isdigit():
            value += ".0"  # yacs takes no int for a float: WEIGHT_DECAY 0
        try:
            cfg.merge_from_list([key, value])
        except (ValueError, AssertionError) as error:
            raise UserError(f"{_wrong(key, was, value)}.") from error
    return keys


def flatten(cfg: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"SOLVER": {"BASE_LR": 0.02}}`` -> ``{"SOLVER.BASE_LR": 0.02}``."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def check_keys(keys: Iterable[str], where: str, lines: Mapping[str, int] | None = None) -> None:
    """Refuse a key that no config has (``UserError``), naming the nearest, and the line."""
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
    """The values, with whole numbers made floats where the key takes one (``BASE_LR: 1``).

    Raises:
        UserError: a value of the wrong type, with its line.
    """
    default = flatten(default_config())

    def settle(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        settled: dict[str, Any] = {}
        for leaf, value in values.items():
            key = f"{prefix}{leaf}"
            if isinstance(value, Mapping):
                settled[leaf] = settle(value, f"{key}.")
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            settled[leaf] = float(value) if whole and isinstance(default[key], float) else value
            _try(key, settled[leaf], default[key], f"{where}, line {lines.get(key, 1)}")
        return settled

    return settle(nested, "")


def _try(key: str, value: Any, was: Any, where: str) -> None:
    """Yacs takes a value for a key, or `UserError`."""
    from detectron2.config import CfgNode

    node = CfgNode({"KEY": was})
    try:
        node.merge_from_other_cfg(CfgNode({"KEY": value}))
    except (ValueError, AssertionError, KeyError) as error:
        raise UserError(f"{where}: {_wrong(key, was, value)}.") from error


def _wrong(key: str, was: Any, value: Any) -> str:
    such = "" if isinstance(was, bool) else f" such as {_plain(was)!r}"
    return f"{key} takes {KINDS.get(type(was), type(was).__name__)}{such}, not {value!r}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


SEMANTIC = "SemanticSegmentor"


def is_semantic_model(cfg: CfgNode) -> bool:
    """Whether the model gives each pixel a class, instead of finding objects."""
    return bool(cfg.MODEL.META_ARCHITECTURE == SEMANTIC)
