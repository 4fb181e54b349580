"""From any checkpoint of a ResNet to named backbone tensors, with every tensor accounted for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_common.reader.errors import CheckpointError
from moco_common.reader.formats import read_checkpoint
from moco_det.conversion.account import Report, odd_values
from moco_det.conversion.account_tensors import account, canonical_names, select
from moco_det.conversion.architecture import Architecture, to_detectron2
from moco_det.conversion.find_encoder import flatten, recognise
from moco_det.conversion.pixel_settings import own_metadata, settings_of
from moco_det.conversion.proof import Proof, prove
from moco_det.conversion.rescale import divide, factors, sentence
from moco_det.conversion.weight_files import load_detectron2_weights, version, write, writer_for

TARGETS = ("detectron2", "torchvision")


@dataclass(frozen=True)
class Converted:
    """A converted backbone.

    Attributes:
        tensors: float32 (counters int64), by the target's names, in the network's order.
        metadata: pixel_mean and pixel_std (of 0 to 255, in the order of "format"), format,
            stride_in_1x1, depth, num_groups, width_per_group, stem_out_channels,
            res2_out_channels, source, encoder, source_sha256, version; with ``rescale`` also
            rescaled, the largest factor that a convolution was divided by.
        report: what became of every tensor of the file, warnings, and the proof.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    report: Report


def convert(
    path: str | os.PathLike[str],
    to: str = "detectron2",
    *,
    output: str | os.PathLike[str] | None = None,
    source: str | None = None,
    prefix: str | None = None,
    encoder: str | None = None,
    drop: Sequence[str] = (),
    stride_in_1x1: bool | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    pixel_format: str | None = None,
    rescale: bool = False,
    proof: bool = True,
) -> Converted:
    """Convert the ResNet of any checkpoint.

    Args:
        path: the checkpoint: PyTorch, pickle or safetensors, of any project.
        to: "detectron2" or "torchvision", whose names the tensors get.
        output: file to write: .pkl (detectron2 only), .pth or .safetensors. It appears only
            after the proof has held for what was written.
        source: the project, when the file's structure does not tell (see docs/convert.md).
        prefix: of the encoder's tensors in the file, likewise.
        encoder: which encoder of several, such as "key" or "student".
        drop: regular expressions of tensors to leave out, beside those that are known.
        stride_in_1x1: where a bottleneck's stride sits; False unless the file tells. True for
            Detectron2's MSRA weights.
        pixel_mean, pixel_std: statistics of 0 to 255 that the network was trained with;
            ImageNet's unless the file tells.
        pixel_format: "RGB" (default unless the file tells) or "BGR".
        rescale: give every convolution the norm of a fresh one, and the running statistics of the
            norm behind it what goes with that: the same function, which fine-tuning moves more
            easily (see `moco_det.conversion.rescale`).
        proof: run the network in both libraries and compare.

    Returns:
        The tensors, the metadata and the account.

    Raises:
        CheckpointError: the file cannot be read, is no ResNet that the target can hold, has
            tensors missing or unexplained, or the two networks differ by more than 1e-4.
    """
    options = _Options(
        to=to,
        output=None if output is None else Path(output),
        source=source,
        prefix=prefix,
        encoder=encoder,
        drop=drop,
        stated={
            "pixel_mean": pixel_mean, "pixel_std": pixel_std, "format": pixel_format,
            "stride_in_1x1": stride_in_1x1,
        },
        rescale=rescale,
        proof=proof,
    )  # fmt: skip
    try:
        return _convert(Path(path), options)
    except CheckpointError as error:  # what is wrong with a tensor is found far from the file
        raise error.at(Path(path)) from None


@dataclass(frozen=True)
class _Options:
    """The keyword arguments of `convert`; ``stated`` are settings that override the file's."""

    to: str
    output: Path | None
    source: str | None
    prefix: str | None
    encoder: str | None
    drop: Sequence[str]
    stated: Mapping[str, Any]
    rescale: bool
    proof: bool


def _convert(path: Path, options: _Options) -> Converted:
    to, output, rescale = options.to, options.output, options.rescale
    if to not in TARGETS:
        raise CheckpointError(f"the target {to} is not one of {', '.join(TARGETS)}.", kind="option")
    if output is not None:
        writer_for(output, to)
    tree = read_checkpoint(path)
    tensors, originals, texts = flatten(tree)
    found = recognise(
        tensors, texts, source=options.source, prefix=options.prefix, encoder=options.encoder
    )
    names = canonical_names(tensors, found)
    told, notes = settings_of(path, tree, tensors, found.source.name)
    told |= {key: value for key, value in options.stated.items() if value is not None}
    backbone, architecture = select(tensors, names, found, bool(told["stride_in_1x1"]))
    if to == "torchvision" and architecture.stride_in_1x1 and architecture.block != "basic":
        raise CheckpointError(
            "the network has its stride in the first 1x1 convolution of a block (STRIDE_IN_1X1), "
            "where torchvision's has it in the 3x3: the tensors would load and compute something "
            "else.",
            kind="unsupported",
        )
    rename: Callable[[str], str] = (lambda n: str(to_detectron2(n))) if to == TARGETS[0] else str
    entries = account(tensors, originals, names, found, backbone, rename, options.drop)
    if architecture.block == "basic" and architecture.res2_out_channels != 64:
        notes.append(
            "Detectron2's config cannot build a ResNet-18 or -34 of this width (it wants 64 "
            "channels in res2); its ResNet.make_stage can"
        )
    kept = {torch.float32, torch.int64}
    if others := sorted({str(t.dtype) for t in backbone.values()} - {str(d) for d in kept}):
        notes.append(f"{', '.join(others)} became float32")
    backbone = {name: _owned(tensor) for name, tensor in backbone.items()}
    grown = factors(backbone, architecture)
    if said := sentence(grown, divided=rescale):
        notes.append(said)
    final = divide(backbone, architecture, grown) if rescale else backbone
    result = {rename(name): tensor for name, tensor in final.items()}
    metadata = {
        "pixel_mean": [float(v) for v in told["pixel_mean"]],
        "pixel_std": [float(v) for v in told["pixel_std"]],
        "format": str(told["format"]),
        **architecture.metadata(),
        "source": str(told.get("source") or found.source.name),
        "encoder": str(told.get("encoder") or found.encoder),
        "source_sha256": _sha256(path),
        "version": version(),
    }
    if rescale:
        metadata["rescaled"] = max(grown.values())
    roles = dict.fromkeys([found.encoder, *found.others.values()])
    report = Report(
        found.source.name, found.encoder, found.prefix, tuple(roles), architecture, to, entries,
        odd_values(backbone), notes,
    )  # fmt: skip
    # The mapped input goes before the output is read back: three copies are never held at once.
    del tree, tensors

    def check(written: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        report.proof = _prove(backbone, written, architecture, meta, to, grown if rescale else {})
        if not report.proof.holds:
            oddity = f" ({report.warnings[0]})" if report.warnings else ""
            raise CheckpointError(
                f"the converted network differs from the source by {report.proof.excess}{oddity}: "
                "nothing was written.",
                kind="proof",
                details=str(report.proof),
            )

    if output is not None:
        author = {"moco-det": "MOCO", "MoCo": "MOCO"}.get(metadata["source"], metadata["source"])

        def read_back(written: Path) -> None:
            if options.proof:
                check(*_read_back(written, to))

        write(output, result, metadata | {"author": author}, to=to, check=read_back)
    elif options.proof:
        check(result, metadata)
    return Converted(result, metadata, report)


def _owned(tensor: Tensor) -> Tensor:
    """A contiguous copy in float32 (counters int64): the mapped file may change or vanish."""
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _prove(
    backbone: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    architecture: Architecture,
    metadata: Mapping[str, Any],
    to: str,
    divided: Mapping[str, float],
) -> Proof:
    """Source in one library, written file in the other; the file's own metadata are believed."""
    statistics = {k: tuple(metadata[k]) for k in ("pixel_mean", "pixel_std")}
    if to == "detectron2":
        target = Architecture.of_metadata(metadata)
        return prove(backbone, written, architecture, target, divided=divided, **statistics)
    theirs = {str(to_detectron2(name)): tensor for name, tensor in backbone.items()}
    inverse = {name: 1 / factor for name, factor in divided.items()}
    return prove(written, theirs, architecture, architecture, divided=inverse, **statistics)


def _read_back(path: Path, to: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if to == "detectron2":
        weights = load_detectron2_weights(path)
        return weights.tensors, weights.metadata or {}
    tree = read_checkpoint(path)
    return {k: v for k, v in tree.items() if isinstance(v, Tensor)}, own_metadata(tree) or {}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
