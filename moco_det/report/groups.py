"""Which runs are trials of one thing, and in what groups of them differ."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco_det.config.protocols import HOUSEKEEPING, split_name
from moco_det.report.runs import Run, strip_trial

# Keys in which two trials of one thing may differ. results.json names the data set by itself.
_TRIAL_KEYS = HOUSEKEEPING | {"DATASETS.TEST"}
# Keys that follow from the layout of the weights: siblings of a protocol differ in these.
_LAYOUT_KEYS = {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"}
_LAYOUT_KEYS |= {"MODEL.RESNETS.STRIDE_IN_1X1"}


@dataclass
class Group:
    """Runs that differ in the seed only."""

    label: str
    runs: list[Run]

    @property
    def results(self) -> dict[str, Any]:
        """Those of the first run; what they say of protocol and data all runs share."""
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
        """A metric of each run, in their order."""
        return [run.scores()[metric] for run in self.runs]


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """Evaluated runs by what they have in common, and a sentence for each oddity.

    Runs are trials of one thing if protocol, data set, deviations, iterations, the name of the
    directory and of the weights (both without seed and trial parts) and every other key of the
    config agree. A run that repeats another's seed with the same scores is a copy: it is left
    out and named, for it would feign a spread of zero.
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
    """Config keys in which two groups differ beyond weights, their layout and the seed."""
    first, second = a.runs[0].config, b.runs[0].config
    keys = sorted((first.keys() | second.keys()) - _TRIAL_KEYS - _LAYOUT_KEYS)
    return [key for key in keys if first.get(key) != second.get(key)]


def _identity(run: Run) -> tuple[Any, ...]:
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
