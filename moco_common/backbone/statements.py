"""Comparison of what a file states about its network with what its tensors show.

Some networks have the tensors of a plain ResNet but compute something else (timm's ``resnetaa50``
and ``resnetblur50`` blur before each stride, torchvision's segmentation networks dilate). Their
files often name them: in ``arch``, in a training script's arguments, in mmcv's ``meta.config``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from moco_common.backbone.architecture import Architecture
from moco_common.reader.errors import CheckpointError
from moco_common.reader.formats import Discarded

# Keys that name a network, and keys of dictionaries in which to search for such keys.
_NETWORKS = frozenset(
    """arch architecture backbone backbone_name base_encoder base_model encoder encoder_name
    model model_name net network""".split()  # noqa: SIM905
)
_PLACES = frozenset(
    """__metadata__ args cfg config hparams hyper_parameters kwargs meta metadata model_args
    model_kwargs""".split()  # noqa: SIM905
)
_LONGEST, _DEEPEST = 1 << 20, 5  # limits: characters of a text, nested dictionaries
_NAME = re.compile(
    r"(?P<before>[a-z\d]*?)(?P<wide>wide)?resne(?P<next>x?)t"
    r"(?P<inside>(?:v\d)?[a-z]*)(?P<depth>\d*)(?P<after>[a-z]*)\w*"
)
# Marks of variants before "resnet", between it and the depth, and after the depth.
_BEFORE = frozenset("aa bam ca cbam csp eca ge h i ibn nf pre preact se sk t".split())  # noqa: SIM905
_INSIDE = frozenset(
    "aa blur c d gn ibn rs s se sk v1c v1d v1e v1s v2 vc vd".split()  # noqa: SIM905
)
_AFTER = frozenset(
    """aa antialiased ap blur blurpool c cbam d dilated gn ibn lpf os16 os8 s se t td ts v1c v1d v1e
    v1s vc vd""".split()  # noqa: SIM905
)
_DILATED = frozenset(("fcn", "deeplabv3"))  # torchvision's, whose last stages have no stride
_DEPTHS = frozenset(map(str, (10, 14, 18, 20, 26, 32, 34, 44, 50, 56, 101, 110, 152, 200, 269)))
# Arguments of mmcv's, timm's and torchvision's classes, and their values for a plain ResNet.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "deep_stem": (False,),
    "avg_down": (False,),
    "dcn": (None,),
    "plugins": (None,),
    "aa_layer": (None, ""),
    "strides": ((1, 2, 2, 2),),
    "dilations": ((1, 1, 1, 1),),
    "replace_stride_with_dilation": (None, (False, False, False)),
    "output_stride": (None, 32),
}


def check_statements(tree: Any, architecture: Architecture) -> None:
    """Check that no statement in a file contradicts the architecture of its tensors.

    Raises:
        CheckpointError: the file names a network other than this plain ResNet.
    """
    for key, stated in _statements(tree):
        name = stated if isinstance(stated, str) else ""
        if not _fits(name, architecture) if name else stated[1] not in _PLAIN[stated[0]]:
            what = name or "{} = {}".format(*stated)
            raise CheckpointError(
                f"the file states {key}: {what}, which computes something else than the plain "
                f"{architecture} that its tensors resemble: pre-train a plain ResNet or, if the "
                "statement is wrong, save the state dict alone.",
                kind="unsupported", key=key,
            )  # fmt: skip


def stride_of(tree: Any) -> bool | None:
    """Return ``stride_in_1x1`` as stated by mmcv's config in a file; None if it is not stated."""
    styles = [value for key, value in _configs(tree) if key == "style"]
    return styles[0] == "caffe" if styles else None


def _fits(name: str, architecture: Architecture) -> bool:
    """Return False if a name denotes a ResNet other than this plain one."""
    tokens = [token for token in re.split(r"[\W_]+", name.lower()) if token]
    for index, token in enumerate(tokens):
        match = _NAME.fullmatch(token)
        if match is None:
            if re.match(r"res2net|resnest|regnet", token):
                return False
            continue
        following = tokens[index + 1 : index + 3]
        depth = match["depth"]
        if not depth and following and following[0] in _DEPTHS:
            depth = following.pop(0)
        marks = (match["inside"], _INSIDE), (match["before"], _BEFORE), (match["after"], _AFTER)
        if any(mark in known for mark, known in marks) or (depth and match["inside"] == "v"):
            return False
        if (following and following[0] in _AFTER) or _DILATED & set(tokens[:index]):
            return False
        if depth in _DEPTHS and int(depth) != architecture.depth:
            return False
        if match["next"] and architecture.num_groups == 1:
            return False
    return True


def _statements(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``(key, name of a network)`` and ``(key, (argument, value))``."""
    for key, value in _walk(tree, "", 0):
        leaf = key.rpartition(".")[2]
        if leaf in _PLAIN:
            yield key, (leaf, tuple(value) if isinstance(value, list) else value)
        elif isinstance(value, str):
            yield key, value
    for leaf, value in _configs(tree):
        if leaf == "type":
            yield "meta.config", str(value)
        elif leaf == "depth":
            yield "meta.config", f"resnet{value}"
        elif leaf in _PLAIN:
            yield "meta.config", (leaf, value)


def _walk(node: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    node = node.values if isinstance(node, Discarded) else node
    if not isinstance(node, dict) or depth > _DEEPEST:
        return
    parts = path.split(".")
    inside = parts[-1] in _NETWORKS
    of_network = not _NETWORKS.isdisjoint(parts) or parts[-1].endswith("kwargs")
    for key, value in node.items():
        if not isinstance(key, str):
            continue
        at = f"{path}.{key}" if path else key
        if isinstance(value, str) and key in _PLACES and value[:1] == "{":
            value = _json(value)
        if isinstance(value, (dict, Discarded)) and key in _NETWORKS | _PLACES:
            yield from _walk(value, at, depth + 1)
        elif of_network and key in _PLAIN and not isinstance(value, Tensor):
            yield at, value
        elif isinstance(value, str) and (
            key in _NETWORKS or (inside and key in ("name", "type", "_target_"))
        ):
            yield at, value[:200]


def _json(text: str) -> Any:
    try:
        return json.loads(text) if len(text) < _LONGEST else None
    except (ValueError, RecursionError):
        return None


def _configs(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the backbone's arguments from the text of an mmcv config (an entry of ``meta``)."""
    meta = tree.get("meta") if isinstance(tree, dict) else None
    for text in meta.values() if isinstance(meta, dict) else ():
        if not isinstance(text, str) or len(text) > _LONGEST:
            continue
        start = re.search(r"""\bbackbone['"]?\s*[=:]\s*(dict\(|\{)""", text)
        if start is None:
            continue
        level, end = 1, start.end()
        while level and end < len(text):
            level += (text[end] in "({[") - (text[end] in ")}]")
            end += 1
        yield from _arguments(text[start.end() : end - 1])


def _arguments(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the top-level arguments of a call or items of a dictionary."""
    value = r"""'[^']*'|"[^"]*"|\([^()]*\)|\[[^\[\]]*\]|dict\(|\{|[^\s,(){}\[\]]+"""
    level = 0
    for match in re.finditer(rf"""['"]?(\w+)['"]?\s*[=:]\s*({value})|[(){{}}]""", text):
        if match[1] is None:
            level += 1 if match[0] in "({" else -1
            continue
        key, found = match[1], match[2]
        if not level:
            yield key, _value(found)
        level += found in ("dict(", "{")


def _value(text: str) -> Any:
    if text[0] in "([":
        parts = [part.strip() for part in text[1:-1].split(",") if part.strip()]
        return tuple(_value(part) for part in parts)
    known = {"None": None, "True": True, "False": False, "dict(": "dict", "{": "dict"}
    if text in known:
        return known[text]
    return int(text) if re.fullmatch(r"\d{1,9}", text) else text.strip("'\"")
