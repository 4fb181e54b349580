"""The configuration of a pre-training run: defaults, named recipes, KEY VALUE overrides."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from moco_common.config import read_yaml
from moco_common.errors import UserError

# What users look for, and why it is not there.
NOT_KEYS = {
    "SOLVER.ACCUMULATION_STEPS": "accumulated gradients would not be those of the large batch, "
    "because BN statistics (and, without a queue, the negatives) would be those of each small one. "
    "Lower SOLVER.BATCH_SIZE, which lowers the learning rate with it, or set SOLVER.PRECISION.",
}
# What a value is called that is not of the default's type.
KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
}


def get_defaults() -> CfgNode:
    """All keys with their defaults (MoCo v1 on ImageNet-1M), one comment a key."""
    cfg = CfgNode()
    cfg.METHOD = "moco"  # moco, end-to-end, memory-bank, simclr, byol or swav
    cfg.SEED = 0  # of weights, order, views, queue and permutations
    cfg.DATA = []  # specs: a folder, a list file, coco:JSON:IMAGES or shards:URL; set by --data
    cfg.OUTPUT_DIR = "./runs/pretrain"  # set by --output-dir

    cfg.MODEL = CfgNode()
    cfg.MODEL.DEPTH = 50  # of the ResNet: 18, 34, 50, 101 or 152
    cfg.MODEL.WIDTH = 1.0  # multiplier of every layer's channels: 0.25 on CPUs, 2 for a wide net
    cfg.MODEL.GROUPS = 1  # cardinality of the 3x3 convolutions: 32 for ResNeXt-50 32x4d
    cfg.MODEL.WIDTH_PER_GROUP = 64  # channels of a group in res2: 4 for ResNeXt-50 32x4d
    # BN groups over all ranks; each of at least 4 images. Ranks count as groups, so a run on one
    # process means the same as one on this many GPUs.
    cfg.MODEL.BN_GROUPS = 8
    cfg.MODEL.SYNC_BN = False  # one BN group: statistics over all ranks, whatever BN_GROUPS says

    cfg.INPUT = CfgNode()
    cfg.INPUT.CROP_SIZE = 224  # side of a view, pixels
    cfg.INPUT.MIN_SCALE = 0.2  # smallest area of a crop, as a share of the image
    cfg.INPUT.AUGMENTATION = "moco-v1"  # of the paper named: moco-v1, moco-v2, simclr, byol, swav
    cfg.INPUT.SMALL_CROPS = 0  # small views of multi-crop, beside the pair
    cfg.INPUT.SMALL_CROP_SIZE = 96  # side of a small view, pixels
    cfg.INPUT.SMALL_SCALE = 0.14  # largest area of a small crop, and then smallest of a large one
    cfg.INPUT.ON_DEVICE = False  # colour and blur on the GPU; the CPUs decode, crop and resize

    cfg.MOCO = CfgNode()
    cfg.MOCO.DIM = 128  # length of a key
    # K, the number of negatives; any number, batches need not divide it. Below the number of
    # images on small data, or an image's own old key becomes its negative.
    cfg.MOCO.QUEUE_SIZE = 65536
    # m: how much of the key encoder is kept in a step, so an average of 1 / (1 - m) steps; a short
    # run needs a smaller one.
    cfg.MOCO.MOMENTUM = 0.999
    cfg.MOCO.TEMPERATURE = 0.07  # T, by which similarities are divided: lower is sharper
    cfg.MOCO.MLP = False  # v2's head: one hidden layer as wide as the features
    cfg.MOCO.MLP_BN = False  # BN after both layers of it: not in v2, leaves the plateau sooner
    cfg.MOCO.SHUFFLE_BN = True  # permute keys over ranks and BN groups: without, BN may leak

    cfg.BANK = CfgNode()  # METHOD memory-bank; its head and temperature are MOCO's
    cfg.BANK.NEGATIVES = 65536  # K, drawn in each step; at most the images less a batch
    cfg.BANK.MOMENTUM = 0.5  # m of an image's key: m old + (1 - m) new, normalised

    cfg.SIMCLR = CfgNode()
    cfg.SIMCLR.DIM = 128  # length of an embedding
    cfg.SIMCLR.TEMPERATURE = 0.1  # tau, by which similarities are divided: lower is sharper

    cfg.BYOL = CfgNode()
    cfg.BYOL.HIDDEN = 4096  # hidden units of projector and predictor
    cfg.BYOL.DIM = 256  # length of a projection
    cfg.BYOL.MOMENTUM = 0.996  # tau: what the target network keeps in a step at first; ends at 1

    cfg.SWAV = CfgNode()
    cfg.SWAV.HIDDEN = 2048  # hidden units of the projector
    cfg.SWAV.DIM = 128  # length of an embedding
    cfg.SWAV.PROTOTYPES = 3000  # number of clusters; fewer for few images
    cfg.SWAV.TEMPERATURE = 0.1  # tau, by which similarities are divided: lower is sharper
    cfg.SWAV.EPSILON = 0.05  # smoothness of the codes, at least 0.025
    cfg.SWAV.SINKHORN_ITERS = 3  # iterations of Sinkhorn-Knopp
    cfg.SWAV.FREEZE_ITERS = 313  # iterations at the start in which the prototypes stand still
    cfg.SWAV.QUEUE_SIZE = 0  # embeddings of past batches that help to compute codes
    cfg.SWAV.QUEUE_START_ITER = 0  # iteration from which on they do

    cfg.SOLVER = CfgNode()
    cfg.SOLVER.OPTIMIZER = "sgd"  # sgd or lars
    cfg.SOLVER.TRUST_COEFFICIENT = 0.001  # eta of lars: a step's length as a share of the weights'
    cfg.SOLVER.BATCH_SIZE = 256  # images of a step, over all ranks; BASE_LR follows it
    # Learning rate before the schedule; where a pair sets BATCH_SIZE alone, scaled with it.
    cfg.SOLVER.BASE_LR = 0.03
    cfg.SOLVER.MOMENTUM = 0.9  # of SGD: how much of the last step's direction is kept
    cfg.SOLVER.WEIGHT_DECAY = 1e-4  # pull of every weight towards zero; lars spares BN and biases
    # Length of the run; in one epoch there are as many samples as there are images. 0: MAX_ITER
    # alone says how long it is.
    cfg.SOLVER.EPOCHS = 200
    cfg.SOLVER.MAX_ITER = 0  # where positive, ends the run and its schedule, if EPOCHS does not
    cfg.SOLVER.SCHEDULE = "step"  # of the learning rate: step, cosine, exponential or constant
    cfg.SOLVER.MILESTONES = [0.6, 0.8]  # of "step", as shares of the run: epochs 120, 160 of 200
    cfg.SOLVER.GAMMA = 0.1  # factor at each milestone of "step", or of each decay of "exponential"
    cfg.SOLVER.DECAY_PERIOD = 0  # of "exponential": iterations between two decays
    cfg.SOLVER.END_SHARE = 0.0  # of "cosine": where it ends, as a share of BASE_LR
    cfg.SOLVER.PRECISION = "float32"  # or bfloat16, float16: autocast in the encoders, for GPUs
    cfg.SOLVER.COMPILE = False  # compile the encoders; minutes at the start of a run
    cfg.SOLVER.WARMUP_ITERS = 0  # iterations in which the rate rises linearly to BASE_LR
    cfg.SOLVER.WARMUP_EPOCHS = 0.0  # the same in epochs; a pair that sets one clears the other

    cfg.DATALOADER = CfgNode()
    # Processes a rank that decode, at most as many as there are cores; they do not change the run.
    cfg.DATALOADER.NUM_WORKERS = 4
    cfg.DATALOADER.MAX_BAD_SHARE = 0.05  # share of unreadable images; more is an error

    cfg.PROBE = CfgNode()
    # Folder of class folders (or of train/ and test/ that hold them) for kNN during the run; ""
    # for none. Labels are used for nothing else.
    cfg.PROBE.DATA = ""
    cfg.PROBE.PERIOD_EPOCHS = 0.0  # epochs between evaluations; 0: only at the end of the run

    cfg.CHECKPOINT = CfgNode()
    cfg.CHECKPOINT.PERIOD = 1000  # iterations between checkpoints
    cfg.CHECKPOINT.KEEP = 2  # newest checkpoints kept

    cfg.LOG = CfgNode()
    cfg.LOG.PERIOD = 20  # iterations between progress lines
    return cfg


def recipe_folder() -> Path:
    """Where the named recipes lie: inside the installed package, or in the checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs" / "pretrain"


def recipe_names() -> list[str]:
    """Names that ``--config`` takes."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def load_config(name_or_file: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Defaults, then a recipe by name or a YAML file, then ``KEY VALUE`` pairs.

    When a pair sets ``SOLVER.BATCH_SIZE`` and none sets ``SOLVER.BASE_LR``, the recipe's learning
    rate is scaled linearly with the batch (Goyal et al. 2017). A pair that sets the warm-up in
    iterations clears the recipe's in epochs, and the other way round.

    Raises:
        UserError: unknown recipe or key (naming the nearest), a value of the wrong type; of a file
            with its line.
    """
    cfg = get_defaults()
    path = _find(name_or_file)
    values, lines = read_yaml(path)
    if not values:
        raise UserError(f"{path} holds no keys: write `KEY: value` lines.")
    for key, value in leaves(values).items():
        _set(cfg, key, value, f"{path}, line {lines[key]}," if key in lines else str(path))
    recipe_batch = cfg.SOLVER.BATCH_SIZE
    if len(overrides) % 2:
        raise UserError(
            f"Overrides come in KEY VALUE pairs, and '{overrides[-1]}' has no partner: "
            f"write for instance `SOLVER.BATCH_SIZE 128`."
        )
    keys = list(overrides[::2])
    for key, text in zip(keys, overrides[1::2], strict=True):
        _set(cfg, key, _literal(text), "the command line")
    if "SOLVER.BATCH_SIZE" in keys and "SOLVER.BASE_LR" not in keys:
        cfg.SOLVER.BASE_LR *= cfg.SOLVER.BATCH_SIZE / recipe_batch
    warmups = ("SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_EPOCHS")
    for one, other in (warmups, warmups[::-1]):
        if one in keys and other not in keys:
            _set(cfg, other, 0, "the command line")
    return cfg


def split_specs(values: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part what follows ``--data`` into data specs and the KEY VALUE pairs that may trail them.

    The pairs begin at the first value that is a key of the configuration and no existing path.
    """
    keys = key_names()
    for i, value in enumerate(values):
        if (value in keys or re.fullmatch(r"[A-Z_]+\.[A-Z0-9_.]+", value)) and not (
            Path(value).exists()
        ):
            return list(values[:i]), list(values[i:])
    return list(values), []


def _find(name_or_file: str) -> Path:
    names = recipe_names()
    if not name_or_file:
        raise UserError(f"--config is missing: name a recipe ({', '.join(names)}) or a YAML file.")
    if name_or_file in names:
        return recipe_folder() / f"{name_or_file}.yaml"
    path = Path(name_or_file)
    if path.is_file():
        return path
    near = difflib.get_close_matches(name_or_file, names, n=1)
    raise UserError(
        f"--config {name_or_file} is neither a file nor a recipe: "
        + (f"did you mean {near[0]}? " if near else "")
        + f"The recipes are {', '.join(names)}."
    )


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"SOLVER": {"BASE_LR": 0.03}}`` -> ``{"SOLVER.BASE_LR": 0.03}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@cache
def key_names() -> tuple[str, ...]:
    """All keys, dotted, in the order of the defaults."""
    return tuple(leaves(get_defaults()))


def check_key(key: str, where: str) -> None:
    """Refuse what is no key (`UserError`), naming the nearest; ``where`` it stands."""
    known = key_names()
    if key in known:
        return
    if key in NOT_KEYS:
        raise UserError(f"{where} sets {key}, which is no key: {NOT_KEYS[key]}")
    near = difflib.get_close_matches(key.upper(), known, n=2, cutoff=0.5)
    leaf = key.upper().rpartition(".")[2]
    near += [name for name in known if name.rpartition(".")[2] == leaf and name not in near][:2]
    raise UserError(
        f"{where} sets {key}, which is no key"
        + (f": did you mean {' or '.join(near)}?" if near else f": one of {', '.join(known)}.")
    )


def _set(cfg: CfgNode, key: str, value: object, where: str) -> None:
    """Set one dotted key, whose default fixes its type; whole numbers may stand for floats."""
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
    if type(old) is not type(value):
        raise UserError(
            f"{where} sets {key} to {value!r}: it takes {KINDS[type(old)]}"
            + ("." if isinstance(old, bool) else f" such as {old!r}.")
        )
    node[leaf] = value


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)
