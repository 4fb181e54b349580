"""YAML as bounded data, and files of nested keys with the line of each key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from moco_common.errors import UserError
from moco_common.files import read_regular

MAX_BYTES, MAX_VALUES, MAX_DEPTH, MAX_NUMBER = 1 << 20, 100_000, 50, 1000
MAX_INTEGER = 1 << 64


class LimitError(yaml.YAMLError):  # type: ignore[misc]
    """Raised for YAML whose values would cost far more time or memory than its text."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's loader of plain values, with bounded integers."""

    def construct_yaml_int(self, node: yaml.Node) -> int:
        value = int(super().construct_yaml_int(node))
        if abs(value) >= MAX_INTEGER:
            raise LimitError("an integer of more than 64 bits")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """Parse plain YAML; a Python tag is refused, never evaluated.

    Aliases and merge keys count as often as they are used, numbers have at most `MAX_NUMBER`
    characters, and integers at most 64 bits, so that the cost is bounded.

    Raises:
        yaml.YAMLError: it is not plain YAML, or exceeds a limit.
    """
    return _parse(text)[0]


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the nested values of a file and the line of each dotted key, counted from 1.

    Raises:
        UserError: the file is unreadable, is not YAML of nested keys, or states a key twice.
    """
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {error}.") from None
    try:
        values, lines = _parse(text, path)
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


def _parse(text: str, path: Path | None = None) -> tuple[Any, dict[str, int]]:
    """Return the values and, for a file, the line of each dotted key."""
    if len(text) > MAX_BYTES:
        raise LimitError(f"more than {MAX_BYTES:,} characters")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _count(node, {}, 0)
        lines = _lines(node, path) if path else {}
        return loader.construct_document(node), lines
    except RecursionError:
        raise LimitError(f"nested more than {MAX_DEPTH} deep") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's constructors of numbers and dates, such as 2024-99-99 or `!!int x`.
        raise yaml.YAMLError(f"a value that cannot be read ({error})") from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """Return the number of values below a node, with aliases expanded; ``counts`` are by id."""
    if depth > MAX_DEPTH:
        raise LimitError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(node, yaml.ScalarNode):
        if not node.tag.endswith((":str", ":binary")) and len(node.value) > MAX_NUMBER:
            raise LimitError(f"a number of {len(node.value):,} characters")
        return 1
    if id(node) not in counts:
        counts[id(node)] = MAX_VALUES  # while it is being counted: an alias inside itself
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        counts[id(node)] = 1 + sum(_count(part, counts, depth + 1) for part in parts)
    if counts[id(node)] >= MAX_VALUES:
        raise LimitError(f"more than {MAX_VALUES:,} values, or an alias inside itself")
    return counts[id(node)]


def _lines(node: yaml.Node, path: Path, prefix: str = "") -> dict[str, int]:
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
