"""``train_net --explain``: a description of a run, or of one key of the config."""

import inspect
import re
import textwrap
from collections.abc import Iterable

from detectron2.config import CfgNode, defaults

from moco_det.config.defaults import add_moco_det_config, check_keys, default_config, flatten
from moco_det.config.key_descriptions import end_sentence, explanation, meaning
from moco_det.config.protocols import HOUSEKEEPING, differences, get_protocol, protocol_names
from moco_det.engine.resume import may_change
from moco_det.engine.setup import Options, prepare

WIDTH = 100


def explain(options: Options) -> None:
    """Print the description of a key, or of the run that the command line defines.

    Raises:
        UserError: the key is unknown, or the run contradicts itself.
    """
    if options.explain:
        print(explain_key(options.explain))
    else:
        plan = prepare(options)
        print(explain_run(plan.cfg, plan.notes))


def explain_run(cfg: CfgNode, notes: Iterable[str] = ()) -> str:
    """Describe a run: notes on this machine, the resolved keys, explanatory sentences.

    Args:
        cfg: the resolved config.
        notes: lines about device, weights, data and schedule, as the run logs them.
    """
    lines = [*notes, "", "resolved settings that differ from Detectron2's defaults:"]
    changed = differences(default_config(), cfg)
    lines += [f"  {line}" for line in changed if line.split(" ", 1)[0] not in HOUSEKEEPING]
    lines.append("")
    for sentence in explanation(cfg) or ["The config follows no protocol."]:
        lines += textwrap.wrap(sentence, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def explain_key(key: str) -> str:
    """Describe a key: its meaning, its default, and its value in each protocol with the source.

    Raises:
        UserError: the key is unknown; the message lists similar keys.
    """
    check_keys([key], where="the command line")
    default = flatten(default_config())[key]
    if key == "SOURCE":
        return "\n".join(f"{name}: {get_protocol(name).SOURCE}" for name in protocol_names())
    group = meaning(key)
    lines = [key, *_paragraph(f"{_comment(key)} {group.decides}")]
    lines += [f"  default: {_value(default)}", *_paragraph(f"If a run changes it: {group.changed}")]
    values: dict[str, list[str]] = {}
    sources: list[str] = []
    for name in protocol_names():
        cfg = get_protocol(name)
        value, supervised = (
            _value(flatten(c)[key]) for c in (cfg, get_protocol(f"{name}-supervised"))
        )
        values.setdefault(value, []).append(name)
        if supervised != value:
            values.setdefault(supervised, []).append(f"{name}-supervised")
        if value != _value(default):
            sources += _paragraph(f"{name}: {cfg.SOURCE}", indent="    ")
    lines.append("  in the protocols:")
    for value, names in values.items():
        lines += _paragraph(f"{value}: {', '.join(names)}", indent="    ")
    lines += ["  sources:", *sources] if sources else []
    return "\n".join([*lines, f"  on --resume: {may_change(key)}"])


def _comment(key: str) -> str:
    """Return the comment above the definition of a key, here or in Detectron2."""
    for source, root in (
        (inspect.getsource(add_moco_det_config), "cfg"),
        (inspect.getsource(defaults), "_C"),
    ):
        found = re.search(
            rf"((?:^ *#.*\n)+)^ *{root}\.{re.escape(key)} = ", source, flags=re.MULTILINE
        )
        if found:
            words = re.sub(r"^ *#+ ?", "", found.group(1), flags=re.MULTILINE).split()
            text = " ".join(words)
            if text.strip("- "):
                return end_sentence(text)
    return ""


def _paragraph(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        text.strip(),
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_on_hyphens=False,
    )


def _value(value: object) -> str:
    return str(list(value) if isinstance(value, tuple) else value) if value != "" else "''"
