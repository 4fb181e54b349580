"""Protocols: named Detectron2 configs, and the deviations of a run from them.

The protocols (``VOC``, ``COCO-C4-1x``, ...) are in ``configs/detection``. Each has the variants
``NAME-moco`` (the same as ``NAME``), ``NAME-supervised`` and ``NAME-random``, which differ from it
only in what the layout of the weights requires. ``NAME-GN`` and its variants have group norm
wherever ``NAME`` has batch norm.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco_common.config import read_yaml
from moco_common.errors import UserError
from moco_det.config.defaults import (
    apply_overrides,
    check_keys,
    check_pairs,
    check_values,
    default_config,
    flatten,
)

if TYPE_CHECKING:
    from detectron2.config import CfgNode

INITIALISATIONS = ("moco", "supervised", "random")
_Files = dict[Path, tuple[dict[str, Any], dict[str, Any]]]  # their own values, and merged ones
_LONGEST_CHAIN = 20
_MOST_BASES = 100  # in one list
GROUP_NORM = "GN"  # suffix of a protocol's name, and Detectron2's name for the norm
# Keys for how and where a run is executed, which do not affect what it measures.
HOUSEKEEPING = frozenset(
    {
        "VERSION",
        "PROTOCOL",
        "SOURCE",
        "OUTPUT_DIR",
        "SEED",
        "LOG_PERIOD",
        "VIS_PERIOD",
        "CUDNN_BENCHMARK",
        "PREFLIGHT",
        "TRACKERS",
        "MODEL.DEVICE",
        "MODEL.WEIGHTS",
        "MODEL.ARCHITECTURE_FROM",
        "DATASETS.CLASSES",
        "DATASETS.STRICT",
        "DATALOADER.NUM_WORKERS",
        "SOLVER.CHECKPOINT_PERIOD",
        "SOLVER.CHANNELS_LAST",
        "SOLVER.EMA_DECAY",
        "SOLVER.REFERENCE_WORLD_SIZE",
        "TEST.EVAL_PERIOD",
        "TEST.BEST_METRIC",
    }
)


def configs_dir() -> Path:
    """Return the folder of the protocols: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs" / "detection"


def protocol_names() -> list[str]:
    """Return the names of the protocols, without variants or shared parts (``_*.yaml``)."""
    return sorted(p.stem for p in configs_dir().glob("*.yaml") if not p.stem.startswith("_"))


def split_name(name: str) -> tuple[str, str]:
    """Split ``"VOC-GN-random"`` into ``("VOC-GN", "random")``; the default is ``"moco"``."""
    base, _, suffix = name.rpartition("-")
    return (base, suffix) if base and suffix in INITIALISATIONS else (name, "moco")


def get_protocol(name: str) -> CfgNode:
    """Return the config of a protocol or variant; raise ``UserError`` if there is none."""
    cfg = default_config()
    cfg.merge_from_other_cfg(type(cfg)(_read_protocol(name)))
    return cfg


def check_request(name_or_file: str | None, overrides: Sequence[str]) -> None:
    """Make the checks of `load_config` that need no Detectron2, whose import takes seconds.

    Raises:
        UserError: an unknown protocol or key, a file that cannot be read, or an odd override.
    """
    check_pairs(overrides)
    if name_or_file is None:
        return
    path = Path(name_or_file).expanduser()
    if path.suffix in (".yaml", ".yml"):
        own, lines = read_yaml(path.resolve())
        own.pop("_BASE_", None)
        check_keys(flatten(own), str(path.resolve()), lines)
    else:
        _file_name(name_or_file)


def load_config(name_or_file: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Load the config of a protocol or a YAML file, and apply ``KEY VALUE`` overrides.

    A file states its differences from the defaults or from its ``_BASE_``, which is a file, the
    name of a protocol, or a list of these. Only plain YAML is read: Python tags are rejected.

    Raises:
        UserError: a name, key or base is unknown, a file is unreadable, or a value has the wrong
            type.
    """
    path = Path(name_or_file).expanduser()
    if path.suffix in (".yaml", ".yml"):
        cfg = default_config()
        cfg.merge_from_other_cfg(type(cfg)(_read_yaml(path)))
    else:
        cfg = get_protocol(name_or_file)
    apply_overrides(cfg, overrides)
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError(
            "MODEL.LOAD_PROPOSALS makes Detectron2 unpickle DATASETS.PROPOSAL_FILES_*, which can "
            "execute code: remove it; the models of all protocols generate their own proposals."
        )
    return cfg


def stated_keys(name_or_file: str) -> list[str]:
    """Return the keys set in a YAML file and its base files; none for a protocol."""
    path = Path(name_or_file).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        return []
    files: _Files = {}
    _read_yaml(path, files)
    return [key for own, _ in files.values() for key in flatten(own)]


def differences(old: CfgNode, new: CfgNode) -> list[str]:
    """Return ``KEY OLD -> NEW`` for every key whose value differs, sorted by key."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key} {_show(before.get(key))} -> {_show(after[key])}"
        for key in sorted(after)
        if _plain(before.get(key)) != _plain(after[key])
    ]


def deviations(cfg: CfgNode) -> list[str]:
    """Return the deviations of a resolved config from its protocol, without housekeeping keys.

    The list is empty for a config that follows no protocol.
    """
    if not cfg.PROTOCOL:
        return []
    changed = differences(get_protocol(cfg.PROTOCOL), cfg)
    return [line for line in changed if line.split(" ", 1)[0] not in HOUSEKEEPING]


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else "''"


def _file_name(name: str) -> str:
    """``"VOC"`` for ``"VOC-GN-random"``, the name of the file that states the protocol."""
    plain = split_name(name)[0].removesuffix(f"-{GROUP_NORM}")
    if plain not in protocol_names():
        nearest = difflib.get_close_matches(plain, protocol_names(), n=1, cutoff=0.0)
        raise UserError(
            f"no protocol is called {name!r}; did you mean {nearest[0] if nearest else '?'}? "
            f"Choose one of {', '.join(protocol_names())}, optionally with -GN and with -moco, "
            "-supervised or -random, or give a .yaml file."
        )
    return plain


def _read_protocol(name: str) -> dict[str, Any]:
    base, weights = split_name(name)
    plain = _file_name(name)
    config = _read_yaml(configs_dir() / f"{plain}.yaml")
    if plain != base:
        _to_group_norm(config, plain)
    layout = f"{weights}-GN" if plain != base and weights == "supervised" else weights
    _update(config, _read_yaml(configs_dir() / f"_weights-{layout}.yaml"))
    config["PROTOCOL"] = base if weights == "moco" else name
    return config


def _to_group_norm(config: dict[str, Any], plain: str) -> None:
    """Replace batch norm by group norm (Wu and He 2018), in place."""
    for section in config["MODEL"].values():
        if isinstance(section, dict) and section.get("NORM"):
            section["NORM"] = GROUP_NORM
    config["TEST"]["PRECISE_BN"]["ENABLED"] = False  # group norm has no running statistics
    config["SOURCE"] = (
        f"unpublished variant of this project: {plain} with group norm (Wu and He 2018, "
        "arXiv:1803.08494) instead of batch norm, for fewer than two images per process"
    )


def _read_yaml(
    path: Path, files: _Files | None = None, inside: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Read a file, merged into its ``_BASE_``, as a nested dict of plain YAML.

    Args:
        files: what has been read before, once each; filled in.
        inside: the files whose ``_BASE_`` this one is.
    """
    path, files = path.resolve(), {} if files is None else files
    if path in inside:
        raise UserError(f"{path} is its own _BASE_ (through {inside[-1]}): break the cycle.")
    if len(inside) > _LONGEST_CHAIN:
        raise UserError(f"{inside[0]} has a chain of more than {_LONGEST_CHAIN} _BASE_ files.")
    if path in files:
        return copy.deepcopy(files[path][1])
    own, lines = read_yaml(path)
    bases = own.pop("_BASE_", [])
    check_keys(flatten(own), str(path), lines)
    own = check_values(own, str(path), lines)
    merged: dict[str, Any] = {}
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: _BASE_ must be a file, a protocol, or a list of these.")
    if len(bases) > _MOST_BASES:
        raise UserError(f"{path}: _BASE_ lists {len(bases)}, but at most {_MOST_BASES} are read.")
    for base in bases:
        beside = path.parent / Path(base).expanduser()
        is_file = beside.suffix in (".yaml", ".yml")
        _update(
            merged,
            _read_yaml(beside, files, (*inside, path)) if is_file else _read_protocol(base),
        )
    _update(merged, own)
    files[path] = own, merged
    return copy.deepcopy(merged)


def _update(base: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Merge nested ``other`` into ``base``, in place; ``other`` takes precedence."""
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _update(base[key], value)
        else:
            base[key] = value
