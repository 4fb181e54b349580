"""YAML files of nested keys, and the line of each key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from moco_common.errors import UserError


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the nested values of a file and the line of each dotted key, counted from 1.

    Only plain YAML is read: a Python tag is refused, never evaluated.

    Raises:
        UserError: the file is unreadable, is not YAML of nested keys, or states a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {error}.") from None
    try:
        values = yaml.safe_load(text)
        lines = _lines(yaml.compose(text, yaml.SafeLoader), path)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        at = f"line {mark.line + 1}: " if mark else ""
        reason = " ".join(str(problem or error).split())
        raise UserError(
            f"{path} is not plain YAML (Python tags are refused): {at}{reason}."
        ) from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path} must hold KEY: VALUE pairs, not a {type(values).__name__}.")
    return values or {}, lines


def _lines(node: yaml.Node | None, path: Path, prefix: str = "") -> dict[str, int]:
    found: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in found:
            raise UserError(
                f"{path}, line {line}, states {name} again (first in line {found[name]}): keep one."
            )
        found[name] = line
        found |= _lines(value, path, f"{name}.")
    return found
