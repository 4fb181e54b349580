"""Grouping of runs that differ in the seed only, and the config keys in which groups differ."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco_det.config.protocols import HOUSEKEEPING, split_name
from moco_det.report.runs import Run, strip_trial

# Keys in which runs of a group may differ. results.json names the data set.
_TRIAL_KEYS = HOUSEKEEPING | {"DATASETS.TEST"}
# Keys determined by the layout of the weights: variants of a protocol differ in them.
_LAYOUT_KEYS = {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"}
_LAYOUT_KEYS |= {"MODEL.RESNETS.STRIDE_IN_1X1"}


@dataclass
class Group:
    """Runs that differ in the seed only."""

    label: str
    runs: list[Run]

    @property
    def results(self) -> dict[str, Any]:
        """results.json of the first run; all runs share its protocol and data set."""
        return self.runs[0].results or {}

    @property
    def table(self) -> tuple[str, str]:
        """Protocol (without the suffix of the weights) and data set: the table the group is in."""
        return split_name(str(self.results["protocol"] or ""))[0], str(self.results["dataset"])

    @property
    def deviations(self) -> list[str] | None:
        """All deviations from the protocol; None if they were not recorded."""
        deviations = self.results.get("deviations")
        return [str(d) for d in deviations] if isinstance(deviations, list) else None

    def metrics(self) -> list[str]:
        """Names of the scores that all runs have, in the order of results.json."""
        every = [run.scores() for run in self.runs]
        return [name for name in every[0] if all(name in scores for scores in every)]

    def values(self, metric: str) -> list[float]:
        """The value of a metric for each run."""
        return [run.scores()[metric] for run in self.runs]


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """Group evaluated runs, and report repeated seeds in a sentence each.

    Runs form a group if protocol, data set, deviations, iterations, the names of the directory and
    of the weights (both without seed and trial parts) and all other config keys agree. A run with
    the seed and the scores of another is a copy: it is left out and reported, because it would
    suggest a spread of zero.
    """
    keyed: dict[tuple[Any, ...], list[Run]] = {}
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
    """Config keys in which two groups differ, apart from weights, their layout and the seed."""
    first, second = a.runs[0].config, b.runs[0].config
    keys = sorted((first.keys() | second.keys()) - _TRIAL_KEYS - _LAYOUT_KEYS)
    return [key for key in keys if first.get(key) != second.get(key)]


def _identity(run: Run) -> tuple[Any, ...]:
    """Everything that the runs of a group have in common."""
    results = run.results or {}
    weights = Path(run.weights)
    config = {k: v for k, v in run.config.items() if k not in _TRIAL_KEYS}
    return (
        str(results["protocol"] or ""),
        str(results.get("init")),
        str(results["dataset"]),
        str(results.get("iteration")),
        json.dumps(results.get("deviations"), default=str),
        run.weights and (strip_trial(weights.parent, run.seed), strip_trial(weights, run.seed)),
        json.dumps(config, sort_keys=True, default=str),
    )


def _make_labels_unique(groups: list[Group]) -> None:
    """Append what differs to the labels of groups with the same label in one table."""
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
            if len({str(g.results.get("iteration")) for g in rivals}) > 1:
                parts.append(f"iteration {rival.results.get('iteration')}")
            # The position is the last resort: no two rows have the same label.
            rival.label += f" [{', '.join(parts) or rivals.index(rival) + 1}]"
