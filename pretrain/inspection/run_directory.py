"""The files of a run: its configuration, its record, its newest intact checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from fvcore.common.config import CfgNode

from moco_common.config import parse_yaml
from moco_common.errors import UserError
from moco_common.files import read_text
from pretrain.checkpoint import format as checkpoint
from pretrain.config.defaults import get_defaults, leaves, set_key
from pretrain.engine.progress import METRICS, read_records
from pretrain.methods import build_method, method_class
from pretrain.methods.base import Method

CONFIG = "config.yaml"


@dataclass
class InspectedRun:
    """A run up to its newest checkpoint.

    Attributes:
        folder: run directory.
        cfg: configuration of the run; keys that an older version did not have take their default.
        records: metrics.json, one dictionary of scalars per progress line; may be empty.
        path: the checkpoint; None before the first.
        state: content of the checkpoint, see `pretrain.checkpoint.format`.
        notes: remarks for the user, one sentence each.
    """

    folder: Path
    cfg: CfgNode
    records: list[dict[str, float]] = field(default_factory=list)
    path: Path | None = None
    state: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Number of completed steps in the checkpoint or, without one, in the record."""
        if self.state:
            return int(self.state["step"])
        return int(self.records[-1]["iteration"]) if self.records else 0

    def image_specs(self) -> list[str]:
        """Return the run's own images, which its files name, if they may be opened unasked.

        A run may come from anywhere, so only image files in local folders, lists and COCO files are
        opened. Shards may name a command or a URL, and an index is written beside local ones.

        Raises:
            UserError: the images are anything else.
        """
        specs: list[Any] = list(self.cfg.DATA)
        for spec in specs:
            if not isinstance(spec, str) or (":" in spec and not spec.startswith("coco:")):
                raise UserError(
                    f"{self.path or self.folder / CONFIG} names {str(spec)[:200]!r} as its images, "
                    f"and only local image files are opened without your word: pass the images you "
                    f"trust with --data, or --no-images."
                )
        return specs

    @property
    def seen(self) -> int:
        """Samples that went into the weights of the checkpoint."""
        return self.step * int(self.cfg.SOLVER.BATCH_SIZE)

    def build(self) -> Method:
        """Build the method with the checkpoint's weights, or initial ones without a checkpoint, in
        evaluation mode. The state of the global generator is preserved.

        Raises:
            UserError: the checkpoint does not fit its configuration.
        """
        fewest = method_class(self.cfg.METHOD).fewest_images(self.cfg)
        images = int(self.state["images"]) if self.state else fewest
        with torch.random.fork_rng(devices=[]):
            method = build_method(self.cfg, num_images=images, total_steps=max(1, self.step))
        if self.state:
            try:
                method.load_state_dict(self.state["state_dict"])
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{self.path} does not fit its own configuration "
                    f"({' '.join(str(error).split())[:200]}): inspect it with the version of this "
                    f"project that wrote it ({self.state.get('version')})."
                ) from None
        return method.eval()


def open_run(path: str | Path) -> InspectedRun:
    """Open a run by its directory or by one of its checkpoints.

    In a directory, the newest intact checkpoint is used; damaged ones are noted.

    Raises:
        UserError: there is no pre-training run, or no checkpoint is intact.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: pass the --output-dir of a pre-training run.")
    if path.is_file():
        state = checkpoint.load_run(path)
        run = InspectedRun(path.parent, _parse(state["config"], path), path=path, state=state)
        run.records = [r for r in _records(run) if r["iteration"] <= run.step]
        return run
    found, notes = checkpoint.candidates(path), []
    for candidate in found:
        try:
            state = checkpoint.load_run(candidate)
        except checkpoint.DamagedError as error:
            notes.append(str(error))
            continue
        cfg = _parse(state["config"], candidate)
        run = InspectedRun(path, cfg, path=candidate, state=state, notes=notes)
        break
    else:
        if found:
            raise UserError(f"No checkpoint in {path} is intact: {' '.join(notes)}")
        run = InspectedRun(path, _parse(_config_text(path), path / CONFIG))
        run.notes.append(f"{path} contains no checkpoint yet: only the curves can be shown.")
    run.records = _records(run)
    return run


def _records(run: InspectedRun) -> list[dict[str, float]]:
    path = run.folder / METRICS
    records = read_records(path) if path.is_file() else []
    if not records:
        run.notes.append(f"{path} contains no record of the run: there are no curves.")
    return records


def _config_text(folder: Path) -> str:
    try:
        return read_text(folder / CONFIG)
    except UserError:
        raise UserError(
            f"{folder} contains no run (neither a checkpoint nor {CONFIG}): pass the --output-dir "
            f"of a pre-training run."
        ) from None


def _parse(text: str, where: Path) -> CfgNode:
    cfg = get_defaults()
    try:
        values = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or "METHOD" not in values:
        raise UserError(
            f"{where} is not the configuration of a pre-training run (it has no METHOD): use "
            f"tools/report.py for fine-tuning runs."
        )
    try:
        for key, value in leaves(values).items():
            set_key(cfg, key, value, "it")
    except UserError as error:
        raise UserError(
            f"{where} is not a configuration of this version of the project ({error}): inspect the "
            f"run with the version that wrote it."
        ) from None
    return cfg
