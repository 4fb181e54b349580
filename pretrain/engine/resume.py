"""The state of a run: capturing it for a checkpoint, and restoring it to resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from moco_common import comm
from moco_common.config import parse_yaml
from moco_common.errors import UserError
from moco_common.files import read_regular
from moco_common.text import counted
from moco_common.version import __version__
from pretrain import distributed
from pretrain.checkpoint import format as checkpoint
from pretrain.config.defaults import all_keys, keys_of, leaves
from pretrain.engine.train_step import TrainStep
from pretrain.methods.base import Method

# Keys, or prefixes of keys, that may change when a run is resumed. Changes of LOGGED are logged.
LOGGED = ("DATA", "SOLVER")
FREE = ("OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER", "CHECKPOINT", "LOG", "PROBE")
FIXED = ("SOLVER.BATCH_SIZE", "SOLVER.OPTIMIZER")  # exceptions: these must not change
STATISTICS = ("running_mean", "running_var")  # BN statistics, which are each rank's own
# Raised by torch for a state of another network, or one that is malformed.
_MISFITS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)
MUST_NOT = "cannot be changed"
MAY_AND_IS_LOGGED = "can be changed; the change is logged"
MAY = "can be changed"


def may_change(key: str) -> str:
    """Return one of the three texts above: the rule for changing a key when a run is resumed."""
    if key in FIXED or not key.startswith(LOGGED + FREE):
        return MUST_NOT
    return MAY if key.startswith(FREE) else MAY_AND_IS_LOGGED


def capture(
    method: Method,
    take_step: TrainStep,
    *,
    config: str,
    step: int,
    images: int,
    data: dict[str, str],
    weights: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Return the state of a run after ``step`` steps, in the form of `pretrain.checkpoint.format`.

    The run is not modified, so its result does not depend on how often it is saved. All ranks must
    call this. The tensors are those of the run, not copies.
    """
    method.before_save()
    device = comm.device()
    state = dict(method.state_dict())
    ranks = {"torch": comm.all_gather(torch.get_rng_state()[None].to(device))}
    if device.type == "cuda":
        ranks["cuda"] = comm.all_gather(torch.cuda.get_rng_state(device)[None].to(device))
    if own := _statistics(method):
        flat = torch.cat([x.reshape(-1) for x in own.values()])
        ranks["batch_norm"] = comm.all_gather(flat[None])  # Wxn
        state |= _unflatten(ranks["batch_norm"].mean(0), own)
    return {
        "format": checkpoint.FORMAT,
        "version": __version__,
        "config": config,
        "step": step,
        "images": images,
        "data": data,
        **({"weights": weights} if weights else {}),
        "state_dict": state,
        **take_step.state_dict(),
        "ranks": ranks,
    }


def shared(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a captured state that must be identical on all ranks.

    Those are all but BN statistics and extra state (where a method stores its sharded tensors),
    which are each rank's own.
    """
    own = (*STATISTICS, "_extra_state")
    tensors = state["state_dict"].items()
    return {name: x for name, x in tensors if not name.endswith(own)}


def check_readable(config: str) -> dict[str, Any]:
    """Return the values of a run's own configuration, as a resumed run will read them.

    Raises:
        UserError: it exceeds the limits of `parse_yaml`, so the run could never be resumed.
    """
    try:
        values: dict[str, Any] = parse_yaml(config)
    except yaml.YAMLError as error:
        raise UserError(
            f"the configuration is too large to be read again ({error}), so the run could not be "
            f"resumed: shorten its longest list, for example with a folder or a .txt list as DATA."
        ) from None
    return values


def check_commands(cfg: CfgNode, folder: Path) -> None:
    """Check that a resumed run executes no command but its own. All ranks must call this, before
    the data are opened.

    Raises:
        UserError: ``DATA`` contains a ``pipe:`` that the newest checkpoint does not.
    """
    commands = [spec for spec in cfg.DATA if "pipe:" in spec]
    if not commands:
        return
    path, state, _ = _newest(folder)
    if state is None:
        return
    recorded = _config(state, path).get("DATA", [])
    for command in commands:
        if command not in recorded:
            raise UserError(
                f"{command!r} is not the command of {path}, whose DATA is {recorded!r}: pass the "
                f"same command to resume the run, or choose another --output-dir."
            )


def recorded_values(folder: Path) -> dict[str, Any]:
    """Return the values by dotted key that the run in a folder has recorded; {} without a record.

    They decide only what ``auto`` means; `restore` compares all keys with those of the checkpoint.
    """
    try:
        recorded = parse_yaml(read_regular(folder / "config.yaml").decode("utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return leaves(recorded) if isinstance(recorded, dict) else {}


class Restored(NamedTuple):
    """The state that a run resumes from.

    Attributes:
        step: number of completed steps; 0 if there is no checkpoint.
        notes: remarks for the log: no checkpoint, damaged checkpoints that were skipped, changed
            keys or data, a changed number of ranks.
        weights: what the run started from, as its checkpoint records it; None for random weights.
    """

    step: int
    notes: list[str]
    weights: dict[str, str] | None = None


def restore(
    cfg: CfgNode,
    folder: Path,
    method: Method,
    take_step: TrainStep,
    images: int,
    data: dict[str, str],
) -> Restored:
    """Restore a run from the newest intact checkpoint in ``folder``, if there is one.

    All ranks must call this.

    Raises:
        UserError: all checkpoints are damaged, or the newest belongs to another configuration.
    """
    path, state, notes = _newest(folder)
    if state is None:
        others = sorted(path.name for path in folder.glob("*.pth"))
        beside = f" (only {', '.join(others[:3])}, of another origin)" if others else ""
        missing = f"there is no checkpoint to resume in {folder}{beside}: starting at iteration 0"
        return Restored(0, [missing])
    notes += _compare(cfg, _config(state, path), path)
    world, ranks = comm.world_size(), state["ranks"]
    try:
        method.load_state_dict(state["state_dict"])
        take_step.load_state_dict(state)
        if len(ranks["torch"]) == world:
            _restore_rank(method, {name: rows[comm.rank()] for name, rows in ranks.items()})
    except _MISFITS as error:
        reason = " ".join(str(error).split())[:500]
        raise UserError(
            f"{path} does not fit this run ({reason}): choose another --output-dir."
        ) from None
    if len(ranks["torch"]) != world:
        notes.append(
            f"{path} was written by {counted(len(ranks['torch']), 'rank')} and is resumed on "
            f"{world}, from the same position in the data"
        )
    if state["images"] != images:
        notes.append(
            f"the data now have {counted(images, 'image')} instead of {state['images']}: from here "
            f"on, the images come in a different order"
        )
    else:
        before = state.get("data", {})  # which earlier versions did not save
        changed = [part for part in before if part in data and before[part] != data[part]]
        if changed:
            notes.append(
                f"the {' and '.join(changed)} of the images differ from those of the checkpoint: "
                f"the run continues with other data"
            )
    return Restored(int(state["step"]), notes, state.get("weights"))


def _config(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        config = parse_yaml(state["config"])
    except (yaml.YAMLError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise UserError(f"{path} contains no readable configuration: use another checkpoint.")
    return config


def _restore_rank(method: Method, own: dict[str, Tensor]) -> None:
    """Restore what is this rank's own: random states and BN statistics."""
    # A copy: torch reads the state as a struct, and crashes on a view that is not aligned.
    torch.set_rng_state(own["torch"].clone())
    if "cuda" in own and comm.device().type == "cuda":
        torch.cuda.set_rng_state(own["cuda"].clone(), comm.device())
    if statistics := _statistics(method):
        for name, value in _unflatten(own["batch_norm"], statistics).items():
            statistics[name].copy_(value)


def _newest(folder: Path) -> tuple[Path, dict[str, Any] | None, list[str]]:
    """Load the newest intact checkpoint; rank 0 chooses it, so that all ranks load the same."""
    name, state, notes = "", None, []
    if comm.rank() == 0:
        for path in checkpoint.candidates(folder):
            try:
                state, name = checkpoint.load_run(path), path.name
                break
            except checkpoint.DamagedError as error:
                notes.append(str(error))
        if notes and not name:
            raise UserError(
                f"All checkpoints in {folder} are damaged: start again with another --output-dir. "
                f"{' '.join(notes)}"
            )
        if notes:
            notes.append(f"resuming from {name}, the newest intact checkpoint")
    name = distributed.all_gather_text(name)[0]
    if name and state is None:
        if not (folder / name).exists():
            raise UserError(
                f"{folder / name} exists on rank 0 but not on rank {comm.rank()}: choose an "
                f"--output-dir on a file system that all hosts share."
            )
        state = checkpoint.load_run(folder / name)
    return folder / name, state, notes


def _compare(cfg: CfgNode, old: dict[str, Any], path: Path) -> list[str]:
    """Return notes on changed keys; raise UserError if one of them must not change."""
    now = leaves(check_readable(cfg.dump()))
    # A key that an older version did not have had the effect of today's default.
    before = {name: key.default for name, key in all_keys().items()} | leaves(old)
    other_methods = all_keys().keys() - keys_of(cfg.METHOD).keys()
    refused, logged = [], []
    for key in sorted({*now, *before} - other_methods):
        if before.get(key) == now.get(key):
            continue
        change = f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        if may_change(key) == MUST_NOT:
            refused.append(change)
        elif may_change(key) == MAY_AND_IS_LOGGED:
            logged.append(change)
    if refused:
        raise UserError(
            f"{path} was written with another configuration and cannot be resumed: "
            f"{'; '.join(refused)}. Use the same configuration or another --output-dir."
        )
    return logged


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in module.named_buffers() if name.endswith(STATISTICS)}


def _unflatten(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([x.numel() for x in like.values()])
    return {name: part.view_as(x) for (name, x), part in zip(like.items(), parts, strict=True)}
