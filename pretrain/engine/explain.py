"""``tools/pretrain.py --explain``: a recipe resolved, or all about one key."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence

from fvcore.common.config import CfgNode

from moco_common.config import read_yaml
from pretrain.config.defaults import (
    check_key,
    get_defaults,
    leaves,
    load_config,
    recipe_folder,
    recipe_names,
)
from pretrain.engine.resume import may_change

WIDTH = 100
OF_METHODS = ("MOCO", "BANK", "SIMCLR", "BYOL", "SWAV")  # sections that only some recipes use
COMMENT = re.compile(r"#\s?(.*)$")


def explain_key(key: str) -> str:
    """What a key does, its default, its value in each recipe with the reason and the source, and
    whether a resumed run may change it.

    Raises:
        UserError: an unknown key; the nearest are named.
    """
    check_key(key, "--explain")
    default = leaves(get_defaults())[key]
    lines = [key, *_paragraph(comments()[key]), f"  default: {_show(default)}"]
    values: dict[str, list[str]] = {}
    sources: list[str] = []
    for name in recipe_names():
        section = key.partition(".")[0]
        stated = read_yaml(recipe_folder() / f"{name}.yaml")[0]
        if section in OF_METHODS and section not in stated:
            continue
        values.setdefault(_show(leaves(load_config(name))[key]), []).append(name)
        if key in leaves(stated):
            sources += _paragraph(f"{name}: {recipe_source(name)}", "    ")
            if reason := _reasons(name).get(key):
                sources += _paragraph(f"{key} there: {reason}", "      ")
    lines += ["  in the recipes:"]
    for value, names in values.items():
        lines += _paragraph(f"{value}: {', '.join(names)}", "    ")
    lines += ["  sources:", *sources] if sources else []
    return "\n".join([*lines, f"  on --resume: {may_change(key)}"])


def explain_run(name_or_file: str, cfg: CfgNode, given: Sequence[str]) -> str:
    """A resolved configuration: its source, and each key that differs from the default, with what
    it does; those that the command line has changed are marked.

    Args:
        given: the KEY VALUE pairs of the command line.
    """
    meant, default = comments(), leaves(get_defaults())
    recipe = leaves(load_config(name_or_file))
    source = recipe_source(name_or_file) if name_or_file in recipe_names() else "a file of yours"
    lines = [*_paragraph(f"recipe {name_or_file}: {source}", ""), ""]
    lines += ["resolved, where the default is another ('*': not as in the recipe):"]
    for key, value in leaves(cfg).items():
        if key in ("DATA", "OUTPUT_DIR") or value == default[key] == recipe[key]:
            continue
        mark = "  " if value == recipe[key] else "* "
        was = f" (the recipe has {_show(recipe[key])})" if mark == "* " else ""
        lines += _paragraph(f"{key} {_show(value)}{was}: {meant[key]}", mark)
    if "SOLVER.BATCH_SIZE" in given[::2] and "SOLVER.BASE_LR" not in given[::2]:
        lines += ["", "SOLVER.BASE_LR has followed SOLVER.BATCH_SIZE; give it to have another."]
    return "\n".join(lines)


def comments() -> dict[str, str]:
    """What is written beside each key, or above it, where the defaults are."""
    found: dict[str, str] = {}
    above: list[str] = []
    section = ""
    for line in inspect.getsource(get_defaults).splitlines():
        if line.lstrip().startswith("#"):
            above.append(line.strip(" #"))
            continue
        code, _, comment = line.partition("  #")
        key = re.match(r"\s*cfg\.([A-Z0-9_.]+) = (.*)", code)
        if key and key.group(2).startswith("CfgNode"):
            section = comment.strip()
        elif key:
            told = " ".join([*above, comment.strip()]).strip()
            found[key.group(1)] = _sentence(told + (f" ({section})" if section else ""))
        above = []
    return found


def recipe_source(name: str) -> str:
    """What a recipe's file says of itself at its head: the paper and its sections."""
    head: list[str] = []
    for line in (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# "))
    return _sentence(" ".join(head) or "not stated")


def _reasons(name: str) -> dict[str, str]:
    """What a recipe's file says beside its keys."""
    path = recipe_folder() / f"{name}.yaml"
    text = path.read_text(encoding="utf-8").splitlines()
    beside = {key: COMMENT.search(text[line - 1]) for key, line in read_yaml(path)[1].items()}
    return {key: _sentence(found.group(1).strip()) for key, found in beside.items() if found}


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."


def _paragraph(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * len(indent) + "  ",
        break_on_hyphens=False,
    )


def _show(value: object) -> str:
    return str(value) if value != "" else "''"
