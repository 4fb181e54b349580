"""Location of the encoder in a file, by the structure of the names or the user's options."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moco_common.backbone.layouts import (
    NAMINGS,
    OTHER_NETWORKS,
    OTHER_RESNETS,
    REASONS,
    SOURCES,
    Naming,
    Source,
)
from moco_common.reader.errors import CheckpointError
from moco_common.text import counted

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module"}
_CONTAINERS = re.compile(
    r"(state_dict|model_state_dict|model_state|model|models|net|network|weights|params)\."
)


@dataclass(frozen=True)
class Recognised:
    """The location of the encoder in a file.

    Attributes:
        source: layout of the project.
        encoder: role of the encoder, such as "query" or "teacher".
        prefix: prefix of its tensors in the flattened names.
        naming: naming scheme of its tensors.
        others: prefix -> role, for the encoders that are not converted.
    """

    source: Source
    encoder: str
    prefix: str
    naming: Naming
    others: dict[str, str] = field(default_factory=dict)


def flatten(tree: Any) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Collect all tensors of a file by flattened name, in which wrappers are left out.

    Returns:
        name -> tensor; name -> name in the file, with the wrappers; and the top-level strings as
        "key=value".
    """
    tensors: dict[str, Tensor] = {}
    originals: dict[str, str] = {}
    seen: set[int] = set()

    def walk(node: Any, path: str) -> None:
        if isinstance(node, Tensor):
            parts = path.split(".")
            name = ".".join(part for part in parts if part not in _WRAPPERS)
            name = path if name in tensors or not name else name
            tensors[name], originals[name] = node, path
            return
        if not isinstance(node, (dict, list, tuple)) or id(node) in seen:
            return
        seen.add(id(node))  # visit shared parts once: a small file could expand into a huge one
        items: Iterable[tuple[Any, Any]]
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            walk(value, f"{path}.{key}" if path else str(key))

    walk(tree, "")
    texts = (
        [f"{k}={v}" for k, v in tree.items() if isinstance(v, str)]
        if isinstance(tree, dict)
        else []
    )
    return tensors, originals, texts


def bare(prefix: str) -> str:
    """Strip containers of the weights, such as ``state_dict.``, from the start of a prefix."""
    while match := _CONTAINERS.match(prefix):
        prefix = prefix[match.end() :]
    return prefix


def recognise(
    names: Iterable[str],
    texts: Iterable[str] = (),
    *,
    source: str | None = None,
    prefix: str | None = None,
    encoder: str | None = None,
) -> Recognised:
    """Find the encoder among flattened names.

    Args:
        names: flattened names of all tensors.
        texts: top-level strings of the file, as "key=value".
        source: name of the entry of :data:`SOURCES` to use.
        prefix: prefix of the encoder's tensors, with or without wrappers and containers.
        encoder: role of the encoder to convert, if there are several.

    Raises:
        CheckpointError: there is no ResNet, there are several candidates, or an option matches
            nothing in the file.
    """
    names = list(names)
    found = {
        name[: -len(naming.probe)]: kind
        for kind, naming in NAMINGS.items()
        for name in names
        if name == naming.probe or name.endswith("." + naming.probe)
    }
    found.pop("roi_heads.", None)
    if not found:
        raise _no_resnet(names)
    if prefix is not None:
        wanted = ".".join(p for p in prefix.strip(".").split(".") if p and p not in _WRAPPERS)
        chosen = [p for p in found if p.rstrip(".") == wanted]
        chosen = chosen or [p for p in found if bare(p).rstrip(".") == wanted]
        if not chosen:
            raise _option("prefix", prefix, [p or "''" for p in found])
        found = {chosen[0]: found[chosen[0]], **found}
    entries = _entries(source)
    marked = [*names, *texts]
    fitting: list[tuple[Source, dict[str, str]]] = []
    for entry in entries:
        if source is None and not all(any(re.search(m, n) for n in marked) for m in entry.marks):
            continue
        encoders: dict[str, str] = {}
        for path, kind in found.items():
            for role, pattern in entry.encoders.items():
                if re.fullmatch(pattern, bare(path)) and entry.naming in ("", kind):
                    encoders.setdefault(path, role)
        if encoders and (prefix is None or next(iter(found)) in encoders):
            fitting.append((entry, encoders))
    # Prefer the first layout whose default encoder is present; a file may hold only another one.
    usual = [fit for fit in fitting if next(iter(fit[0].encoders)) in fit[1].values()]
    if usual or fitting:
        entry, encoders = (usual or fitting)[0]
        return _choose(entry, encoders, found, encoder, prefix)
    if prefix is not None:
        unnamed = Source("unnamed project", {"backbone": ".*"})
        return _choose(unnamed, {next(iter(found)): "backbone"}, found, None, prefix)
    raise _option("source", source or "", [bare(p) or "''" for p in found])


def _entries(source: str | None) -> tuple[Source, ...]:
    if source is None:
        return SOURCES

    def simple(text: str) -> str:
        return re.sub(r"[\W_]", "", text.lower())

    named = tuple(
        entry
        for entry in SOURCES
        if simple(source) in (simple(entry.name), *(simple(p) for p in entry.name.split(" / ")))
    )
    if named:
        return named
    known = tuple(dict.fromkeys(entry.name for entry in SOURCES))
    raise CheckpointError(
        f"--source {source} is unknown: choose one of {', '.join(known)}.",
        kind="option", key=source, candidates=known,
    )  # fmt: skip


def _choose(
    entry: Source,
    encoders: dict[str, str],
    found: dict[str, str],
    encoder: str | None,
    prefix: str | None,
) -> Recognised:
    roles = [role for role in entry.encoders if role in encoders.values()]
    if encoder is not None and encoder not in roles:
        raise _option("encoder", encoder, roles)
    if prefix is not None:
        path = next(iter(found))
    else:
        role = encoder or roles[0]
        paths = [p for p, r in encoders.items() if r == role]
        if len(paths) > 1 and entry.encoders[role] == r".+":  # an unknown layout
            plain = [p for p in paths if not re.search(_MOMENTUM, p)]
            if len(plain) != 1:
                raise CheckpointError(
                    "the file holds several ResNets in an unknown layout: choose one with --prefix "
                    f"({', '.join(paths)}).",
                    kind="unrecognised", candidates=tuple(paths),
                )  # fmt: skip
            paths = plain
        path = paths[0]
    others = {p: encoders.get(p, "other") for p in found if p != path}
    return Recognised(entry, encoders.get(path, "backbone"), path, NAMINGS[found[path]], others)


_MOMENTUM = next(pattern for pattern, reason in REASONS if reason == "momentum encoder")
_MOMENTUM_ROLES = ("key", "momentum", "target", "teacher")


def reason(name: str, recognised: Recognised) -> str | None:
    """Return the reason to drop a tensor that is not part of the encoder; None if unknown."""
    for prefix, role in recognised.others.items():
        if prefix and name.startswith(prefix) and not recognised.prefix.startswith(prefix):
            momentum = role in _MOMENTUM_ROLES or re.search(_MOMENTUM, name)
            return "momentum encoder" if momentum else f"{role} encoder"
    inside = name.startswith(recognised.prefix)
    rest = name[len(recognised.prefix) :] if inside else bare(name)
    if inside and re.match(r"fc\b", rest):
        return recognised.source.head
    if recognised.naming is NAMINGS["detectron2"] and re.search(r"(^|\.)res5\.norm\.", name):
        return "detection head"
    return next((why for pattern, why in REASONS if re.search(pattern, rest)), None)


def other_resnet(rests: Iterable[str]) -> tuple[str, str] | None:
    """Return a part that Detectron2's ResNet cannot represent, with one of its tensors, or None."""
    rests = list(rests)
    for pattern, what in OTHER_RESNETS:
        for rest in rests:
            if re.search(pattern, rest):
                return what, rest
    return None


def _option(option: str, value: str, known: list[str]) -> CheckpointError:
    return CheckpointError(
        f"--{option} {value} is not in the file: choose one of {', '.join(known)}.",
        kind="option", key=value, candidates=tuple(known),
    )  # fmt: skip


def _no_resnet(names: list[str]) -> CheckpointError:
    if not names:
        return CheckpointError("the file holds no tensors.", kind="unrecognised")
    if caffe2 := next((name for name in names if name.endswith("_branch2a_w")), None):
        return CheckpointError(
            f"{caffe2} is a name in Caffe2's scheme, of MSRA's networks, which only Detectron2 can "
            "represent, and loads without conversion: to fine-tune from it, pass the file as "
            "MODEL.WEIGHTS of tools/train_net.py.",
            kind="unsupported", key=caffe2,
        )  # fmt: skip
    for pattern, what in OTHER_NETWORKS:
        key = next((name for name in names if re.search(pattern, name)), None)
        if key is not None:
            return CheckpointError(
                f"the file holds {what} (see {key}), not a ResNet that Detectron2 can represent: "
                "pre-train a ResNet, ResNeXt or wide ResNet.",
                kind="unsupported", key=key,
            )  # fmt: skip
    shown = ", ".join(names[:3])
    return CheckpointError(
        f"no ResNet found among the file's {counted(len(names), 'tensor')} ({shown}, ...): none is "
        "named layer1.0.conv1.weight, 4.0.conv1.weight or res2.0.conv1.weight under any prefix.",
        kind="unrecognised", candidates=tuple(names[:10]),
    )  # fmt: skip
