"""``results.json``: what was run, and its scores."""

import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from moco_common.files import replace_text
from moco_det.config.protocols import deviations, split_name


def write_results(
    cfg: CfgNode,
    results: dict[str, Any],
    dataset: str,
    iteration: int | None,
    explanation: Sequence[str] = (),
) -> Path:
    """Write ``OUTPUT_DIR/results.json``: what was run, and its scores.

    Args:
        cfg: the config that is recorded.
        results: scores by task, in percent.
        dataset: the test set as the user named it.
        iteration: how long the model was trained.
        explanation: sentences on what the run was and what its deviations do.
    """
    protocol, initialisation = split_name(cfg.PROTOCOL)
    record = {
        "protocol": protocol or None,
        "init": initialisation if protocol else None,
        "dataset": dataset,
        "seed": cfg.SEED,
        "commit": _commit(),
        "iteration": iteration,
        "weights": cfg.MODEL.WEIGHTS,
        "deviations": deviations(cfg),
        "explanation": list(explanation),
        **results,
    }
    text = json.dumps(_finite(record), indent=2, allow_nan=False)
    return replace_text(Path(cfg.OUTPUT_DIR, "results.json"), text + "\n")


def _finite(value: Any) -> Any:
    """NaN (no object of a class or size in the test set) is null in JSON."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _commit() -> str | None:
    """The commit of the checkout that runs; None where it is installed or git is not there."""
    here = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    inside = (here.parent / ".git").exists()  # not some repository around an installed package
    return done.stdout.strip() or None if done.returncode == 0 and inside else None


# The metric that stands for a task in one line of the log.
HEADLINES = ("AP", "AP50", "AP75", "mIoU", "pACC")


def headline(scores: Mapping[str, Any]) -> str:
    """``"AP 40.12  AP50 61.00  AP75 43.20"``, of one task."""
    return "  ".join(f"{key} {scores[key]:.2f}" for key in HEADLINES if key in scores)


def with_classes_apart(scores: Mapping[str, float]) -> dict[str, Any]:
    """``{"AP": 40, "AP-cat": 50}`` -> ``{"AP": 40, "per_class": {"cat": 50}}``."""
    overall: dict[str, Any] = {k: v for k, v in scores.items() if "-" not in k}
    overall["per_class"] = {k.partition("-")[2]: v for k, v in scores.items() if "-" in k}
    return overall
