"""Run directories: what they hold.

Everything is read as plain JSON and YAML. A file that is missing or broken never stops the
others: it is named in `Run.problems`, and the report says so.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moco_common.errors import UserError
from moco_det.config.defaults import flatten


@dataclass
class Run:
    """One run directory.

    Attributes:
        config: flattened config.yaml ("SOLVER.BASE_LR" -> 0.02); {} where there is none.
        records: metrics.json in the order of iterations, one dict of scalars each.
        results: results.json, or None where the run was not evaluated (or it is unreadable).
        problems: one sentence for each file that could not be read.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, float]] = field(default_factory=list)
    results: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The directory's name without its seed or trial part."""
        return strip_trial(self.path, self.seed)

    @property
    def is_pretraining(self) -> bool:
        """Whether this is a pre-training run, which has neither boxes nor results."""
        if self.results is not None or any("total_loss" in record for record in self.records):
            return False
        configured = not self.config.keys().isdisjoint(("METHOD", "MOCO.QUEUE_SIZE"))
        return configured or any("accuracy" in record for record in self.records)

    @property
    def chance_loss(self) -> float | None:
        """Loss of an encoder that has learned nothing, if this is a pre-training run whose method
        has such a loss."""
        if not self.is_pretraining:
            return None
        recorded = self.series("chance_loss")[1]
        if recorded:
            return recorded[-1]
        # Runs of earlier versions did not record it: log(K+1) where the configuration has K.
        negatives = {"moco": "MOCO.QUEUE_SIZE", "memory-bank": "BANK.NEGATIVES"}
        k = self.config.get(negatives.get(self.config.get("METHOD", "moco"), ""))
        return math.log(k + 1) if k else None

    @property
    def seed(self) -> int | None:
        """The run's seed; None where it was drawn (Detectron2 spells that -1) or is not known."""
        seed = (self.results or {}).get("seed", self.config.get("SEED"))
        return seed if isinstance(seed, int) and seed >= 0 else None

    @property
    def weights(self) -> str:
        """The file the run started from; "" for random weights."""
        return str((self.results or {}).get("weights", self.config.get("MODEL.WEIGHTS")) or "")

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Iterations and finite values of one scalar of metrics.json."""
        points = [
            (r["iteration"], r[key])
            for r in self.records
            if isinstance(r.get(key), int | float) and math.isfinite(r[key])
        ]
        return [p[0] for p in points], [p[1] for p in points]

    def scores(self) -> dict[str, float]:
        """The finite numbers of results.json as {"bbox/AP": percent, "segm/AP": ...}."""
        return {
            f"{task}/{name}": float(value)
            for task, scores in (self.results or {}).items()
            if isinstance(scores, dict)
            for name, value in scores.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }

    def per_class(self, task: str = "bbox") -> dict[str, float]:
        """AP by class name of one task; {} where results.json has none."""
        scores = (self.results or {}).get(task)
        classes = scores.get("per_class") if isinstance(scores, dict) else None
        items = classes.items() if isinstance(classes, dict) else ()
        return {
            str(name): float(value)
            for name, value in items
            if isinstance(value, int | float) and math.isfinite(value)
        }


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read run directories and the trials (`trial_K`) inside them, in the order given.

    Raises:
        UserError: a path is no directory, or no path holds a run.
    """
    runs: dict[Path, Run] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path} is not a run directory: give folders that runs wrote")
        trials = [p for p in path.glob("trial_*") if p.is_dir() and p.name[6:].isdigit()]
        found = [
            p for p in (path, *sorted(trials, key=lambda p: int(p.name[6:]))) if _is_run_dir(p)
        ]
        if not found:
            inside = sorted(p for p in path.iterdir() if p.is_dir() and _is_run_dir(p))
            hint = f"; its runs are inside, so give {path}/*" if inside else ""
            raise UserError(
                f"{path} holds no run (no config.yaml, metrics.json or results.json){hint}"
            )
        for directory in found:
            runs.setdefault(directory.resolve(), read_run(directory))
    return list(runs.values())


def read_run(path: str | Path) -> Run:
    """Read one run directory; whatever is broken is named in `problems`."""
    run = Run(Path(path))
    run.config = _read_config(run)
    run.records = _read_metrics(run)
    run.results = _read_results(run)
    return run


def strip_trial(path: str | Path, seed: int | None = None) -> str:
    """A directory's name without `-seed0`, `_trial_3`, or its bare seed (`_0` with seed 0).

    A bare number that is not the seed stays: `resnet_50` is a name. A directory that is
    nothing but a trial (`trial_0`) is named by its parent.
    """
    path = Path(path).resolve()
    name = re.sub(r"(^|[-_.])(seed|trial|run)[-_.=]?\d+$", "", path.name, flags=re.IGNORECASE)
    if name == path.name and seed is not None:
        name = re.sub(rf"(^|[-_.])0*{seed}$", "", name)
    if name or path.parent == path:
        return name or path.name
    return strip_trial(path.parent, seed)


def _is_run_dir(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.yaml", "metrics.json", "results.json"))


def _read_config(run: Run) -> dict[str, Any]:
    file = run.path / "config.yaml"
    if not file.exists():
        return {}
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.problems.append(f"{file} is not readable as YAML ({_first_line(error)})")
        return {}
    return flatten(tree) if isinstance(tree, dict) else {}


def _read_metrics(run: Run) -> list[dict[str, float]]:
    """One JSON object a line. After a resume the newer record of an iteration counts."""
    file = run.path / "metrics.json"
    if not file.exists():
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        run.problems.append(f"{file} is not readable ({_first_line(error)})")
        return []
    records: list[dict[str, float]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            cut = ": the run was cut off while writing" if number == len(lines) else ""
            run.problems.append(f"{file}, line {number}, is not JSON and left out{cut}")
            continue
        if not isinstance(record, dict) or not isinstance(record.get("iteration"), int | float):
            continue
        while records and records[-1]["iteration"] >= record["iteration"]:
            earlier = records.pop()
            if earlier["iteration"] == record["iteration"]:  # evaluation adds to the iteration
                record = {**earlier, **record}
        records.append(record)
    return records


def _read_results(run: Run) -> dict[str, Any] | None:
    file = run.path / "results.json"
    if not file.exists():
        return None
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        run.problems.append(
            f"{file} is half-written or no JSON ({_first_line(error)}): "
            "evaluate the run again (--eval-only); it is left out"
        )
        return None
    needed = ("protocol", "dataset")
    missing = [key for key in needed if not isinstance(results, dict) or key not in results]
    if missing:
        run.problems.append(f"{file} lacks {' and '.join(missing)}: the run is left out")
        return None
    return results


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
