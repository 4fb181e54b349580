"""Run directories: what they hold, and which of them are trials of one thing.

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

from moco_det.errors import UserError
from moco_det.protocols import HOUSEKEEPING, flatten, split_name

# Keys in which two trials of one thing may differ. results.json names the data set by itself.
_TRIAL_KEYS = HOUSEKEEPING | {"DATASETS.TEST"}
# Keys that follow from the layout of the weights: siblings of a protocol differ in these.
_LAYOUT_KEYS = {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"}
_LAYOUT_KEYS |= {"MODEL.RESNETS.STRIDE_IN_1X1"}


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
        """Whether this is a pre-training run: contrastive, so neither boxes nor results."""
        if self.results is not None or any("total_loss" in record for record in self.records):
            return False
        return "MOCO.QUEUE_SIZE" in self.config or any("accuracy" in r for r in self.records)

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


@dataclass
class Group:
    """Runs that differ in the seed only."""

    label: str
    runs: list[Run]

    @property
    def results(self) -> dict[str, Any]:
        return self.runs[0].results or {}

    @property
    def table(self) -> tuple[str, str]:
        """Protocol (without the weights' suffix) and data set: what may share a table."""
        return split_name(str(self.results["protocol"] or ""))[0], str(self.results["dataset"])

    @property
    def deviations(self) -> list[str] | None:
        """Every deviation from the protocol; None where the runs do not say."""
        deviations = self.results.get("deviations")
        return [str(d) for d in deviations] if isinstance(deviations, list) else None

    def metrics(self) -> list[str]:
        """The scores that every run of the group has, in the order of results.json."""
        every = [run.scores() for run in self.runs]
        return [name for name in every[0] if all(name in scores for scores in every)]

    def values(self, metric: str) -> list[float]:
        return [run.scores()[metric] for run in self.runs]


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


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """Evaluated runs by what they have in common, and a sentence for each oddity.

    Runs are trials of one thing if protocol, data set, deviations, iterations, the name of the
    directory and of the weights (both without seed and trial parts) and every other key of the
    config agree. A run that repeats another's seed with the same scores is a copy: it is left
    out and named, for it would feign a spread of zero.
    """
    keyed: dict[tuple, list[Run]] = {}
    notes: list[str] = []
    for run in runs:
        if run.results is None:
            continue
        same = keyed.setdefault((run.label, *_identity(run)), [])
        twin = next((r for r in same if run.seed is not None and r.seed == run.seed), None)
        if twin and twin.scores() == run.scores():
            notes.append(f"{run.path} repeats {twin.path} (seed {run.seed}, same scores): left out")
            continue
        if twin:
            notes.append(f"{twin.path} and {run.path} share seed {run.seed}: both are counted")
        same.append(run)
    groups = [Group(key[0], same) for key, same in keyed.items()]
    _make_labels_unique(groups)
    return groups, notes


def differing_keys(a: Group, b: Group) -> list[str]:
    """Config keys in which two groups differ beyond weights, their layout and the seed."""
    first, second = a.runs[0].config, b.runs[0].config
    keys = sorted((first.keys() | second.keys()) - _TRIAL_KEYS - _LAYOUT_KEYS)
    return [key for key in keys if first.get(key) != second.get(key)]


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


def _identity(run: Run) -> tuple:
    """What trials of one thing share."""
    results = run.results or {}
    weights = Path(run.weights)
    config = {k: v for k, v in run.config.items() if k not in _TRIAL_KEYS}
    return (
        str(results["protocol"] or ""),
        str(results.get("init")),
        str(results["dataset"]),
        results.get("iteration"),
        json.dumps(results.get("deviations"), default=str),
        run.weights and (strip_trial(weights.parent, run.seed), strip_trial(weights, run.seed)),
        json.dumps(config, sort_keys=True, default=str),
    )


def _make_labels_unique(groups: list[Group]) -> None:
    """Groups of one table and name get what tells them apart behind the name."""
    for group in groups:
        rivals = [g for g in groups if (g.label, g.table) == (group.label, group.table)]
        if len(rivals) < 2:
            continue
        for rival in rivals:
            others = [g for g in rivals if g is not rival]
            keys = sorted({key for other in others for key in differing_keys(rival, other)})
            parts = [f"{key}={rival.runs[0].config.get(key)}" for key in keys[:2]]
            if len({g.runs[0].weights for g in rivals}) > 1:
                parts.append(Path(rival.runs[0].weights).name or "random")
            if len({g.results.get("iteration") for g in rivals}) > 1:
                parts.append(f"iteration {rival.results.get('iteration')}")
            # The position is the last resort: two rows never carry one name.
            rival.label += f" [{', '.join(parts) or rivals.index(rival) + 1}]"


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
        results = json.loads(file.read_text(encoding="utf-8"))
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
