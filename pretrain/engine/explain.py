"""``tools/pretrain.py --explain``: a resolved recipe, or one key."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from fvcore.common.config import CfgNode

from moco_common.config import read_yaml
from pretrain.config.defaults import (
    all_keys,
    check_key,
    keys_of,
    leaves,
    load_config,
    recipe_folder,
    recipe_names,
)
from pretrain.engine.resume import may_change
from pretrain.methods import METHODS, declaration

WIDTH = 100


def explain_key(key: str) -> str:
    """Describe a key: its default, its value in each recipe with reason and source, and whether a
    resumed run may change it.

    Raises:
        UserError: an unknown key; the error names the nearest.
    """
    check_key(key, "--explain")
    default, description = all_keys()[key]
    lines = [key, *_paragraph(description), f"  default: {_show(default)}"]
    if key == "METHOD":
        for name in METHODS:
            lines += _paragraph(f"{name}: {declaration(name).explanation}", "    ")
    values: dict[str, list[str]] = {}
    sources: list[str] = []
    for name in recipe_names():
        cfg = load_config(name)
        if key not in keys_of(cfg.METHOD):
            continue
        values.setdefault(_show(leaves(cfg)[key]), []).append(name)
        if key in leaves(read_yaml(recipe_folder() / f"{name}.yaml")[0]):
            sources += _paragraph(f"{name}: {recipe_source(name)}", "    ")
            if reason := _reasons(name).get(key):
                sources += _paragraph(f"{key}: {reason}", "      ")
    lines += ["  recipes:"]
    for value, names in values.items():
        lines += _paragraph(f"{value}: {', '.join(names)}", "    ")
    lines += ["  sources:", *sources] if sources else []
    return "\n".join([*lines, f"  on --resume: {may_change(key)}"])


def explain_run(name_or_file: str, cfg: CfgNode, given: Sequence[str]) -> str:
    """Describe a resolved configuration: its source, its method, and each key that differs from the
    default; those that the command line has changed are marked.

    Args:
        given: the KEY VALUE pairs of the command line.
    """
    recipe, values = leaves(load_config(name_or_file)), leaves(cfg)
    source = recipe_source(name_or_file) if name_or_file in recipe_names() else "a file of yours"
    lines = _paragraph(f"recipe {name_or_file}: {source}", "")
    lines += [*_paragraph(f"method {cfg.METHOD}: {declaration(cfg.METHOD).explanation}", ""), ""]
    lines += ["Keys that differ from their default ('*': changed from the recipe):"]
    for key, (default, description) in keys_of(cfg.METHOD).items():
        value = values[key]
        if key in ("DATA", "OUTPUT_DIR") or value == default == recipe[key]:
            continue
        mark = "  " if value == recipe[key] else "* "
        was = f" (recipe: {_show(recipe[key])})" if mark == "* " else ""
        lines += _paragraph(f"{key} {_show(value)}{was}: {description}", mark)
    if cfg.MODEL.WEIGHTS:
        lines += ["", *explain_weights(cfg)]
    if "SOLVER.BATCH_SIZE" in given[::2] and "SOLVER.BASE_LR" not in given[::2]:
        lines += ["", "SOLVER.BASE_LR was scaled with SOLVER.BATCH_SIZE; set it to override this."]
    return "\n".join(lines)


def explain_weights(cfg: CfgNode) -> list[str]:
    """Describe the weights that a run starts from, after checking that they fit it."""
    import torch

    from moco_common.backbone.accounting import summary
    from pretrain.checkpoint.initial_weights import check_architecture, read_initial_weights
    from pretrain.methods.base import Run
    from pretrain.methods.components import encoder_builder

    weights = read_initial_weights(cfg.MODEL.WEIGHTS)
    with torch.device("meta"):
        network = encoder_builder(cfg, Run(1, 1, 1), torch.nn.Identity)()
    check_architecture(weights, network)
    head = "The projection head is taken along." if cfg.MODEL.TAKE_HEAD else "The head is new."
    lines = _paragraph(f"starts from {weights.describe()}.", "")
    lines += _paragraph(f"Tensors: {summary(weights.encoder.entries, 'taken')}. {head}")
    return [*lines, *(line for note in weights.notes for line in _paragraph(f"{note}."))]


def recipe_source(name: str) -> str:
    """The comment at the head of a recipe's file: the paper and its sections."""
    head: list[str] = []
    for line in (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# "))
    return _sentence(" ".join(head) or "not stated")


def _reasons(name: str) -> dict[str, str]:
    """The comments beside the keys of a recipe's file."""
    path = recipe_folder() / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    beside = {key: lines[n - 1].partition(" #")[2].strip() for key, n in read_yaml(path)[1].items()}
    return {key: _sentence(comment) for key, comment in beside.items() if comment}


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
