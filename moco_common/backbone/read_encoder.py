"""The ResNet of any checkpoint under torchvision's names, with each tensor accounted for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moco_common.backbone.accounting import Entry, account, canonical_names, select
from moco_common.backbone.architecture import Architecture
from moco_common.backbone.find_encoder import Recognised, flatten, recognise
from moco_common.backbone.pixel_settings import settings_of
from moco_common.backbone.statements import check_statements, stride_of
from moco_common.reader.formats import read_checkpoint


@dataclass(frozen=True)
class Encoder:
    """A ResNet as found in a file.

    Attributes:
        tensors: tensors of the backbone by torchvision name, in torchvision's order. They are
            mapped from the file: clone them if they have to outlive it.
        rest: all other tensors of the file, by flattened name.
        originals: flattened name -> name in the file, in the order of ``entries``.
        architecture: depth, width and position of the strides.
        found: location in the file, and the project that wrote it.
        settings: pixel_mean, pixel_std, format and stride_in_1x1, as stated by the file, else
            torchvision's; for a converted file also its source and encoder.
        entries: what happened to each tensor of the file.
        notes: sentences on the origin of the settings.
    """

    tensors: dict[str, Tensor]
    rest: dict[str, Tensor]
    originals: dict[str, str]
    architecture: Architecture
    found: Recognised
    settings: dict[str, Any]
    entries: list[Entry]
    notes: list[str]


def read_encoder(
    path: str | os.PathLike[str],
    *,
    source: str | None = None,
    prefix: str | None = None,
    encoder: str | None = None,
    drop: Sequence[str] = (),
    stated: Mapping[str, Any] | None = None,
) -> Encoder:
    """Read the ResNet of any checkpoint, without executing code.

    Args:
        path: checkpoint of any project, saved by PyTorch, pickle or safetensors.
        source: name of the project, if it cannot be recognised.
        prefix: prefix of the encoder's tensors in the file, if it cannot be found.
        encoder: which encoder to take from a file with several, such as "key" or "student".
        drop: regular expressions of tensors to drop in addition to the known ones.
        stated: settings that override those of the file; None values are ignored.

    Raises:
        CheckpointError: the file cannot be read, holds no ResNet that Detectron2 can represent,
            lacks tensors or has unknown ones.
    """
    path = Path(path)
    tree = read_checkpoint(path)
    tensors, originals, texts = flatten(tree)
    found = recognise(tensors, texts, source=source, prefix=prefix, encoder=encoder)
    names = canonical_names(tensors, found)
    settings, notes = settings_of(path, tree, tensors, found.source.name)
    if (stride := stride_of(tree)) is not None:
        settings["stride_in_1x1"] = stride
        notes.append("the position of the stride is from its meta.config")
    settings |= {key: value for key, value in (stated or {}).items() if value is not None}
    backbone, architecture = select(tensors, names, found, bool(settings["stride_in_1x1"]))
    check_statements(tree, architecture)
    entries = account(tensors, originals, names, found, backbone, drop)
    taken = {names[canonical] for canonical in backbone}
    rest = {name: tensor for name, tensor in tensors.items() if name not in taken}
    return Encoder(backbone, rest, originals, architecture, found, settings, entries, notes)


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
