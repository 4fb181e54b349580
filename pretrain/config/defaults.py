"""The configuration of a pre-training run: defaults, named recipes, KEY VALUE overrides."""

from __future__ import annotations

import ast
import copy
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode

from moco_common.config import read_yaml
from moco_common.errors import UserError
from pretrain.methods import METHODS, declaration
from pretrain.methods.automatic import AUTO
from pretrain.methods.automatic import KEYS as AUTOMATIC


class Key(NamedTuple):
    """A configuration key: its default, whose type its values have, and what it sets."""

    default: Any
    description: str


# The keys that all methods share; each method's file declares its own.
KEYS = {
    "METHOD": Key("moco", "Pre-training method."),  # `all_keys` adds the names
    "SEED": Key(0, "Seed of weights, image order, views, queue and permutations."),
    "DATA": Key(
        [],
        "Image sources: folders, list files, coco:JSON:IMAGES, video:FILE?every=N or shards:URL. "
        "Set by --data.",
    ),
    "OUTPUT_DIR": Key("./runs/pretrain", "Directory of the run. Set by --output-dir."),
    "MODEL.DEPTH": Key(50, "Depth of the ResNet: 18, 34, 50, 101 or 152."),
    "MODEL.WIDTH": Key(
        1.0,
        "Multiplier of the channels of every layer, such as 0.25 on CPUs or 2 for a wide network.",
    ),
    "MODEL.GROUPS": Key(1, "Cardinality of the 3x3 convolutions, such as 32 for ResNeXt-50 32x4d."),
    "MODEL.WIDTH_PER_GROUP": Key(64, "Channels per group in res2, such as 4 for ResNeXt-50 32x4d."),
    "MODEL.BN_GROUPS": Key(
        8,
        "Number of BN groups over all ranks, each of at least 4 images, or auto for groups of 32. "
        "Ranks count as groups, so a run on one process is equivalent to a run on this many GPUs.",
    ),
    "MODEL.SYNC_BN": Key(
        False, "BN statistics over all ranks, as one group, whatever MODEL.BN_GROUPS is."
    ),
    "MODEL.WEIGHTS": Key(
        "",
        "Checkpoint that all encoders start from, of any project that tools/convert.py reads, or "
        "empty for random weights. A resumed run does not read it again.",
    ),
    "MODEL.TAKE_HEAD": Key(
        False,
        "Start with the projection head of MODEL.WEIGHTS too, which must then fit, as to train a "
        "finished run for longer.",
    ),
    "MODEL.DEVICE": Key("auto", "Device of the run: auto (GPUs if there are any), cuda or cpu."),
    "INPUT.CROP_SIZE": Key(224, "Side of a view in pixels."),
    "INPUT.MIN_SCALE": Key(0.2, "Smallest area of a crop, as a fraction of the image."),
    "INPUT.AUGMENTATION": Key(
        "moco-v1",
        "Paper whose augmentation is used: moco-v1, moco-v2, simclr, byol or swav.",
    ),
    "INPUT.SMALL_CROPS": Key(0, "Number of small views of multi-crop, in addition to the pair."),
    "INPUT.SMALL_CROP_SIZE": Key(96, "Side of a small view in pixels."),
    "INPUT.SMALL_SCALE": Key(
        0.14,
        "Largest area of a small crop, as a fraction of the image. With small crops, it is also "
        "the smallest area of a large crop.",
    ),
    "INPUT.ON_DEVICE": Key(
        False,
        "Colour operations and blur on the GPU, so that the CPUs only decode, crop and resize.",
    ),
    "SOLVER.OPTIMIZER": Key("sgd", "Optimiser: sgd or lars."),
    "SOLVER.TRUST_COEFFICIENT": Key(
        0.001, "Trust coefficient of LARS, eta: length of a step relative to that of the weights."
    ),
    "SOLVER.BATCH_SIZE": Key(
        256, "Images per step over all ranks. SOLVER.BASE_LR is scaled with it."
    ),
    "SOLVER.BASE_LR": Key(
        0.03,
        "Learning rate before the schedule. If the command line sets SOLVER.BATCH_SIZE alone, it "
        "is scaled linearly with the batch.",
    ),
    "SOLVER.MOMENTUM": Key(0.9, "Momentum of the optimiser."),
    "SOLVER.WEIGHT_DECAY": Key(
        1e-4, "Weight decay. LARS does not apply it to BN parameters and biases."
    ),
    "SOLVER.EPOCHS": Key(
        200,
        "Length of the run in epochs, each of as many samples as there are images. With 0, "
        "SOLVER.MAX_ITER alone sets the length.",
    ),
    "SOLVER.MAX_ITER": Key(
        0,
        "Largest number of iterations of the run and its schedule, or 0 for no limit beside "
        "SOLVER.EPOCHS.",
    ),
    "SOLVER.SCHEDULE": Key(
        "step", "Learning rate schedule: step, cosine, exponential or constant."
    ),
    "SOLVER.MILESTONES": Key(
        [0.6, 0.8],
        "Milestones of the step schedule as fractions of the run, such as epochs 120 and 160 of "
        "200.",
    ),
    "SOLVER.GAMMA": Key(
        0.1,
        "Factor of the learning rate at each milestone of the step schedule, or at each decay of "
        "the exponential one.",
    ),
    "SOLVER.DECAY_PERIOD": Key(0, "Iterations between two decays of the exponential schedule."),
    "SOLVER.END_SHARE": Key(
        0.0, "Final learning rate of the cosine schedule, as a fraction of SOLVER.BASE_LR."
    ),
    "SOLVER.PRECISION": Key(
        "float32",
        "Precision of the encoders: float32, or bfloat16 or float16 by autocast, for GPUs.",
    ),
    "SOLVER.COMPILE": Key(
        False, "Compilation of the encoders, which takes minutes at the start of a run."
    ),
    "SOLVER.WARMUP_ITERS": Key(
        0, "Iterations during which the learning rate rises linearly to SOLVER.BASE_LR."
    ),
    "SOLVER.WARMUP_EPOCHS": Key(
        0.0,
        "Length of the warm-up in epochs. A command line that sets the warm-up in one unit clears "
        "the other.",
    ),
    "DATALOADER.NUM_WORKERS": Key(
        4,
        "Decoding processes per rank, at most as many as there are CPU cores, or auto for all "
        "cores. Their number does not affect the result.",
    ),
    "DATALOADER.MAX_BAD_SHARE": Key(
        0.05, "Largest fraction of unreadable images; a larger one is an error."
    ),
    "PROBE.DATA": Key(
        "",
        "Folder of class folders (or of train/ and test/ that hold them) for kNN evaluation during "
        "the run, or empty for none. Labels are used for nothing else.",
    ),
    "PROBE.PERIOD_EPOCHS": Key(
        0.0, "Epochs between kNN evaluations, or 0 for one at the end of the run."
    ),
    "CHECKPOINT.PERIOD": Key(1000, "Iterations between checkpoints."),
    "CHECKPOINT.KEEP": Key(2, "Number of newest checkpoints that are kept."),
    "LOG.PERIOD": Key(20, "Iterations between progress lines."),
}
# Keys that users look for, and why they do not exist.
NOT_KEYS = {
    "SOLVER.ACCUMULATION_STEPS": "accumulated gradients would differ from those of the large "
    "batch, because BN statistics (and, without a queue, the negatives) would be those of each "
    "small one. Lower SOLVER.BATCH_SIZE, which scales the learning rate as well, or set "
    "SOLVER.PRECISION.",
}
TYPE_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
}


def all_keys() -> dict[str, Key]:
    """Every key by its dotted name: the common ones, and those that the methods declare."""
    own = {key: Key(*value) for name in METHODS for key, value in declaration(name).keys.items()}
    *names, last = METHODS
    method = f"Pre-training method: {', '.join(names)} or {last}."
    return KEYS | own | {"METHOD": KEYS["METHOD"]._replace(description=method)}


def keys_of(method: str) -> dict[str, Key]:
    """The common keys and those that ``method`` reads, its own and those of shared sections.

    Raises:
        UserError: there is no such method.
    """
    sections = {key.partition(".")[0] for key in KEYS} | declaration(method).sections
    return {name: key for name, key in all_keys().items() if name.partition(".")[0] in sections}


def get_defaults() -> CfgNode:
    """All keys, of every method, with their defaults (MoCo v1 on ImageNet-1M)."""
    cfg = CfgNode()
    for name, key in all_keys().items():
        section, _, leaf = name.rpartition(".")
        if section and section not in cfg:
            cfg[section] = CfgNode()
        (cfg[section] if section else cfg)[leaf] = copy.copy(key.default)
    return cfg


def run_config(cfg: CfgNode) -> CfgNode:
    """The part of a configuration that its method reads, which is what a run records."""
    top = {name.partition(".")[0] for name in keys_of(cfg.METHOD)}
    return CfgNode({name: value for name, value in copy.deepcopy(cfg).items() if name in top})


def recipe_folder() -> Path:
    """Folder of the named recipes, in the installed package or in the checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs" / "pretrain"


def recipe_names() -> list[str]:
    """Names of the recipes, for ``--config``."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def load_config(name_or_file: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Load the defaults, a recipe by name or a YAML file, and ``KEY VALUE`` pairs, in this order.

    If a pair sets ``SOLVER.BATCH_SIZE`` and none sets ``SOLVER.BASE_LR``, the recipe's learning
    rate is scaled linearly with the batch (Goyal et al. 2017). A pair that sets the warm-up in
    iterations clears the recipe's in epochs, and vice versa.

    Raises:
        UserError: an unknown recipe or key (with the nearest name), or a value of the wrong type;
            for a file, with the line.
    """
    cfg = get_defaults()
    path = _find(name_or_file)
    values, lines = read_yaml(path)
    if not values:
        raise UserError(f"{path} contains no keys: write lines such as `METHOD: moco`.")
    for key, value in leaves(values).items():
        set_key(cfg, key, value, f"{path}, line {lines[key]}," if key in lines else str(path))
    recipe_batch = cfg.SOLVER.BATCH_SIZE
    for word in overrides[::2]:
        if "/" in word or word.endswith((".pth", ".yaml")):
            raise UserError(
                f"{word} is a path, not a KEY VALUE pair: --resume takes no path, it resumes from "
                f"the newest checkpoint in --output-dir; --config takes a YAML file."
            )
    if len(overrides) % 2:
        raise UserError(
            f"Overrides are KEY VALUE pairs, but '{overrides[-1]}' has no partner: write pairs "
            f"such as `SOLVER.BATCH_SIZE 128`."
        )
    keys = list(overrides[::2])
    for key, text in zip(keys, overrides[1::2], strict=True):
        set_key(cfg, key, _literal(text), "the command line")
    if "SOLVER.BATCH_SIZE" in keys and "SOLVER.BASE_LR" not in keys:
        cfg.SOLVER.BASE_LR *= cfg.SOLVER.BATCH_SIZE / recipe_batch
    warmups = ("SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_EPOCHS")
    for one, other in (warmups, warmups[::-1]):
        if one in keys and other not in keys:
            set_key(cfg, other, 0, "the command line")
    return cfg


def split_specs(values: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the values after ``--data`` into data specs and the KEY VALUE pairs after them.

    The pairs begin at the first value that is a configuration key and not an existing path.
    """
    keys = all_keys()
    for i, value in enumerate(values):
        if (value in keys or re.fullmatch(r"[A-Z_]+\.[A-Z0-9_.]+", value)) and not (
            Path(value).exists()
        ):
            return list(values[:i]), list(values[i:])
    return list(values), []


def split_settings(values: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split what follows ``--slurm`` into settings and the KEY VALUE pairs that may trail them."""
    settings = 0
    while settings < len(values) and "=" in values[settings]:
        settings += 1
    return list(values[:settings]), list(values[settings:])


def _find(name_or_file: str) -> Path:
    names = recipe_names()
    if not name_or_file:
        raise UserError(f"--config is missing: give a recipe ({', '.join(names)}) or a YAML file.")
    if name_or_file in names:
        return recipe_folder() / f"{name_or_file}.yaml"
    path = Path(name_or_file)
    if path.is_file():
        return path
    near = difflib.get_close_matches(name_or_file, names, n=1)
    raise UserError(
        f"--config {name_or_file} is neither a file nor a recipe"
        + (f": did you mean {near[0]}?" if near else ".")
        + f" The recipes are {', '.join(names)}."
    )


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten ``{"SOLVER": {"BASE_LR": 0.03}}`` to ``{"SOLVER.BASE_LR": 0.03}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_key(key: str, where: str) -> None:
    """Raise `UserError` with the nearest names if ``where`` sets something that is not a key."""
    known = all_keys()
    if key in known:
        return
    if key in NOT_KEYS:
        raise UserError(f"{where} sets {key}, which is not a key: {NOT_KEYS[key]}")
    near = difflib.get_close_matches(key.upper(), known, n=2, cutoff=0.5)
    leaf = key.upper().rpartition(".")[2]
    near += [name for name in known if name.rpartition(".")[2] == leaf and name not in near][:2]
    raise UserError(
        f"{where} sets {key}, which is not a key"
        + (
            f": did you mean {' or '.join(near)}?"
            if near
            else f". The keys are {', '.join(known)}."
        )
    )


def set_key(cfg: CfgNode, key: str, value: object, where: str) -> None:
    """Set a dotted key to a value of its default's type; a whole number is a valid float.

    Raises:
        UserError: there is no such key, or the value is of another type or not finite.
    """
    check_key(key, where)
    *parents, leaf = key.split(".")
    node = cfg
    for parent in parents:
        node = node[parent]
    old = node[leaf]
    if isinstance(old, float) and isinstance(value, str):
        value = _literal(value)  # YAML 1.1 reads 1e-4 as text
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, list) and isinstance(value, tuple):
        value = list(value)
    if key in AUTOMATIC and (value == AUTO or type(value) is int):
        node[leaf] = value
        return
    if key in AUTOMATIC:
        raise UserError(f"{where} sets {key} to {value!r}: it takes a whole number or {AUTO}.")
    if type(old) is not type(value):
        raise UserError(
            f"{where} sets {key} to {value!r}: it takes {TYPE_NAMES[type(old)]}"
            + ("." if isinstance(old, bool) else f" such as {old!r}.")
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} sets {key} to {value}: it takes a finite number.")
    node[leaf] = value


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)
