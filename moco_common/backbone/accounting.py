"""The account of a file: every tensor is part of the network, or is dropped for a stated reason."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moco_common.backbone.architecture import Architecture, detect, from_detectron2, to_detectron2
from moco_common.backbone.find_encoder import Recognised, other_resnet, reason
from moco_common.reader.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """One tensor of the file, either mapped to the name ``target`` or dropped for a ``reason``."""

    name: str
    shape: tuple[int, ...]
    target: str | None = None
    reason: str | None = None


def dropped(entries: Sequence[Entry]) -> dict[str, int]:
    """Return the number of dropped tensors by reason."""
    return dict(Counter(entry.reason for entry in entries if entry.reason))


def summary(entries: Sequence[Entry], taken: str) -> str:
    """Count the tensors: how many were read, ``taken``, and dropped for each reason."""
    reasons = ", ".join(f"{count} {why}" for why, count in dropped(entries).items())
    mapped = sum(entry.target is not None for entry in entries)
    left = sum(entry.reason is not None for entry in entries)
    text = f"{len(entries)} read, {mapped} {taken}, {left} dropped"
    return f"{text} ({reasons})" if reasons else text


def canonical_names(tensors: Collection[str], found: Recognised) -> dict[str, str]:
    """Map torchvision names to flattened names, for all tensors named like a backbone's.

    Raises:
        CheckpointError: the names are those of a ResNet that Detectron2 cannot represent.
    """
    names: dict[str, str] = {}
    rests: dict[str, str] = {}
    for name in tensors:
        if name.startswith(found.prefix):
            rests[name[len(found.prefix) :]] = name
    for rest, name in rests.items():
        canonical = found.naming.canonical(rest)
        if canonical is not None:
            names[canonical] = name
    if found.naming.canonical is from_detectron2 and "layer4.0.conv1.weight" not in names:
        for name in tensors:  # a C4 detector has res5 in its heads
            rest = re.sub(r"^(.*\.)?roi_heads\.(?=res5\.)", "", name)
            canonical = from_detectron2(rest) if rest != name else None
            if canonical is not None:
                names[canonical] = name
    if other := other_resnet([*rests, *names]):
        raise CheckpointError(
            f"the file holds a ResNet with {other[0]} (see {names.get(other[1], other[1])}), which "
            "Detectron2's ResNet cannot represent: pre-train a plain ResNet.",
            kind="unsupported",
            key=other[1],
        )
    return names


def select(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], found: Recognised, stride: bool
) -> tuple[dict[str, Tensor], Architecture]:
    """Return the network's tensors by torchvision name, in its order, and the architecture.

    Args:
        tensors: all tensors, by flattened name.
        names: result of :func:`canonical_names`.
        found: location of the encoder.
        stride: whether a bottleneck's stride is in its first convolution.

    Raises:
        CheckpointError: a tensor is missing or has an unexpected shape.
    """
    named = {canonical: tensors[name] for canonical, name in names.items()}
    architecture = detect(named, names=names, stride_in_1x1=stride)
    backbone: dict[str, Tensor] = {}
    for canonical, shape in architecture.shapes().items():
        if canonical not in named:
            own = _own_name(canonical, found)
            free = [n for n in tensors if n not in names.values()]
            near = difflib.get_close_matches(own, free, n=2, cutoff=0.6)
            near += difflib.get_close_matches(own, names.values(), n=3 - len(near), cutoff=0.6)
            raise CheckpointError(
                f"{architecture} requires {own} of shape {shape}, which is missing; similar names "
                "in the file: "
                f"{', '.join(f'{n} {tuple(tensors[n].shape)}' for n in near) or 'none'}.",
                kind="missing_tensor",
                key=own,
                candidates=tuple(near),
            )
        if tuple(named[canonical].shape) != shape:
            raise CheckpointError(
                f"{names[canonical]} has shape {tuple(named[canonical].shape)}, but "
                f"{architecture} requires {shape}.",
                kind="shape",
                key=names[canonical],
            )
        backbone[canonical] = named[canonical]
        counter = canonical.replace("running_var", "num_batches_tracked")
        if counter != canonical and counter in named:
            backbone[counter] = named[counter]
    return backbone, architecture


def _own_name(canonical: str, found: Recognised) -> str:
    if found.naming.canonical is from_detectron2:
        return found.prefix + str(to_detectron2(canonical))
    return found.prefix + canonical


def account(
    tensors: Mapping[str, Tensor],
    originals: Mapping[str, str],
    names: Mapping[str, str],
    found: Recognised,
    backbone: Mapping[str, Tensor],
    drop: Sequence[str],
) -> list[Entry]:
    """Return an entry for each tensor of the file, with torchvision's names as targets.

    Args:
        tensors: all tensors, by flattened name.
        originals: flattened name -> name in the file.
        names: torchvision name -> flattened name.
        found: location of the encoder.
        backbone: the selected tensors, by torchvision name.
        drop: regular expressions of further tensors to drop, matched against names in the file.

    Raises:
        CheckpointError: a tensor is neither part of the encoder nor known to be irrelevant.
    """
    targets = {name: canonical for canonical, name in names.items() if canonical in backbone}
    rests = {name[len(found.prefix) :]: name for name in targets}
    entries, unknown = [], []
    for name, tensor in tensors.items():
        target, why = targets.get(name), None
        if target is None:
            why = reason(name, found) or _duplicate(name, tensors, rests)
            rest = name.removeprefix(found.prefix)
            if why is None and not name.startswith(found.prefix):
                why = "outside the encoder"
            elif why is None and "." not in rest and tensor.numel() <= 1:
                why = "training state"  # such as n_averaged or logit_scale
            if any(re.search(pattern, originals[name]) for pattern in drop):
                why = "--drop"
            if why is None:
                unknown.append(originals[name])
        shape = tuple(tensor.shape)
        entries.append(Entry(originals[name], shape, target, why))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise CheckpointError(
            f"the {found.source.name} encoder under '{found.prefix}' holds {', '.join(unknown[:3])}"
            f"{more}, neither part of a plain ResNet nor known to be irrelevant: pass --drop "
            "PATTERN if the encoder works without it, or --prefix if the encoder is elsewhere.",
            kind="unknown_tensor",
            key=unknown[0],
            candidates=tuple(unknown),
        )
    return entries


def _duplicate(name: str, tensors: Mapping[str, Tensor], rests: Mapping[str, str]) -> str | None:
    """Return the reason to drop a second copy of an encoder's tensor; None for any other tensor.

    Some projects save the encoder both under its own name and inside a Sequential.
    """
    rest = name
    while "." in rest:
        rest = rest.partition(".")[2]
        original = tensors.get(rests.get(rest, ""))
        if original is None or original.shape != tensors[name].shape:
            continue
        if torch.equal(original, tensors[name]):
            return "second copy of the encoder"
    return None


def odd_values(tensors: Mapping[str, Tensor]) -> list[str]:
    """Describe tensors with NaN, infinite or only zero values, and norms that never saw a batch."""
    broken, zero = [], []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            broken.append(f"{name} ({count} of {tensor.numel()})")
        elif name.endswith(".weight") and not tensor.any():
            zero.append(name)
    norms = [name.removesuffix("running_mean") for name in tensors if name.endswith("running_mean")]
    untouched = [
        norm
        for norm in norms
        if not tensors[f"{norm}running_mean"].any() and (tensors[f"{norm}running_var"] == 1).all()
    ]
    findings = []
    if broken:
        findings.append(f"NaN or infinite values in {_some(broken)}")
    if zero:
        findings.append(f"all-zero weights in {_some(zero)}")
    if untouched:
        findings.append(
            f"running statistics of {len(untouched)} of {len(norms)} norms were never updated "
            f"(mean 0, variance 1): {_some([n.rstrip('.') for n in untouched])}"
        )
    return findings


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
