"""Values as annotation files hold them: identifiers, flags and numbers, each read in one way."""

from __future__ import annotations

import re
from typing import Any

_TRUE, _FALSE = frozenset({"true", "yes", "y", "t"}), frozenset({"false", "no", "n", "f"})


def read_id(value: Any) -> str | None:
    """An identifier as text, so that ``1``, ``1.0`` and ``"1"`` are one; None if it is none."""
    if isinstance(value, str):
        return re.sub(r"^(-?\d+)\.0+$", r"\1", value) or None
    whole = whole_number(value)
    return None if whole is None else str(whole)


def is_whole(identifier: str) -> bool:
    """True if an identifier is a whole number as Python writes it (``7``, not ``007``)."""
    return re.fullmatch(r"0|-?[1-9][0-9]{0,999}", identifier) is not None


def whole_number(value: Any) -> int | None:
    """A whole number, which JSON may hold as ``640`` or ``640.0``."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_flag(value: Any) -> bool | None:
    """True or False, also from ``1``, ``"1"`` and ``"True"``; None if unreadable."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        value = read_number(text)
    if not isinstance(value, (bool, int, float)) or value != value:
        return None
    return value != 0


def read_number(text: str | None) -> float | None:
    """The number that a text holds; None for NaN, infinity and anything from 1e9 on."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < 1e9 else None


def numbers_of(value: Any) -> Any:
    """The numbers of a list of strings that all hold one; any other value unchanged."""
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        return value
    read = [read_number(entry) for entry in value]
    return value if None in read else read


def are_numbers(value: Any, count: int) -> bool:
    """True if ``value`` is a list of ``count`` finite numbers below 1e9."""
    if not isinstance(value, list) or len(value) != count:
        return False
    for number in value:  # a plain loop: this is called for every object
        if not isinstance(number, (int, float)) or not abs(number) < 1e9:  # also if NaN
            return False
    return True
