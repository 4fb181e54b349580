"""``results.json``: the record of a run and its scores."""

import json
import math
import os
import re
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from moco_common.config import parse_yaml
from moco_common.errors import UserError
from moco_common.files import read_json, read_text, replace_text
from moco_det.config.protocols import deviations, split_name


def results_folder(output_dir: str | Path, dataset: str) -> Path:
    """Return where the results on a test set belong: the run's own folder, or ``test-NAME`` in it
    if the run has results on another test set, or was trained with another.

    Args:
        dataset: the test set as the user named it.
    """
    folder = Path(output_dir)
    own, name = _own_test_set(folder), _resolved(dataset)
    if own is None or _resolved(own) == name:
        return folder
    words = re.findall(r"\w+", " ".join(Path(part).stem for part in dataset.split(":")))
    return folder / f"test-{'-'.join(words)[:60]}-{zlib.crc32(name.encode()):08x}"


def _own_test_set(folder: Path) -> str | None:
    """The test set of the results or, before there are any, of the config of a run."""
    try:
        return str(read_json(folder / "results.json")["dataset"])
    except (OSError, ValueError, TypeError, LookupError):
        pass  # a damaged file is replaced
    try:
        config = parse_yaml(read_text(folder / "config.yaml"))
        return str(config["DATASETS"]["TEST"][0])
    except (UserError, TypeError, LookupError, yaml.YAMLError):
        return None


def _resolved(dataset: str) -> str:
    """A test set's name with absolute paths."""
    return ":".join(
        os.path.realpath(part) if os.path.exists(part) else part for part in dataset.split(":")
    )


def write_results(
    cfg: CfgNode,
    results: dict[str, Any],
    dataset: str,
    iteration: int | None,
    explanation: Sequence[str] = (),
    folder: str | Path | None = None,
    best: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``results.json``: the record of a run and its scores.

    Args:
        cfg: the config of the run.
        results: scores by task, in percent.
        dataset: the test set as the user named it.
        iteration: number of iterations that the model was trained for.
        explanation: sentences on the run and the effects of its deviations.
        folder: where to write; by default ``OUTPUT_DIR``. See `results_folder`.
        best: metric, value and iteration of the run's best evaluation.
    """
    protocol, initialisation = split_name(cfg.PROTOCOL)
    record = {
        "protocol": protocol or None,
        "init": initialisation if protocol else None,
        "dataset": dataset,
        "seed": cfg.SEED,
        "commit": _commit(),
        "iteration": iteration,
        **(best or {}),
        "weights": cfg.MODEL.WEIGHTS,
        "deviations": deviations(cfg),
        "explanation": list(explanation),
        **results,
    }
    text = json.dumps(_finite(record), indent=2, allow_nan=False)
    return replace_text(Path(folder or cfg.OUTPUT_DIR, "results.json"), text + "\n")


def _finite(value: Any) -> Any:
    """Replace NaN (no object of a class or size in the test set) by None, null in JSON."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _commit() -> str | None:
    """Return the commit of the running checkout; None if installed, or without git."""
    here = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    inside = (here.parent / ".git").exists()  # not some repository around an installed package
    return done.stdout.strip() or None if done.returncode == 0 and inside else None


# The metrics of a task that appear in its line of the log.
HEADLINES = ("AP", "AP50", "AP75", "mIoU", "pACC")
NOTHING_TO_FIND = (
    "; warning: nan, because the test set has nothing to find for this task (crowds, difficult "
    "objects and ignored pixels do not count): check its annotations"
)


def headline(scores: Mapping[str, Any]) -> str:
    """Format the main scores of a task: ``"AP 40.12  AP50 61.00  AP75 43.20"``, with the reason
    where they are NaN."""
    shown = {key: scores[key] for key in HEADLINES if key in scores}
    line = "  ".join(f"{key} {value:.2f}" for key, value in shown.items())
    return line + NOTHING_TO_FIND if any(map(math.isnan, shown.values())) else line


def with_classes_apart(scores: Mapping[str, float]) -> dict[str, Any]:
    """Separate the classes: ``{"AP": 40, "AP-cat": 50}`` becomes ``{"AP": 40, "per_class":
    {"cat": 50}}``."""
    overall: dict[str, Any] = {k: v for k, v in scores.items() if "-" not in k}
    overall["per_class"] = {k.partition("-")[2]: v for k, v in scores.items() if "-" in k}
    return overall
