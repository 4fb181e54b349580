"""The tables of a report: groups of runs, their differences, and the published numbers."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moco_common.errors import UserError
from moco_det.config.protocols import split_name
from moco_det.report.analyse import Analysis, analyse_groups
from moco_det.report.groups import Group, differing_keys
from moco_det.report.published import Published, published
from moco_det.report.significance import Difference, Summary, summarize, welch_difference

COLUMNS = {
    "bbox/AP": "AP",
    "bbox/AP50": "AP50",
    "bbox/AP75": "AP75",
    "segm/AP": "mask AP",
    "keypoints/AP": "keypoint AP",
    "sem_seg/mIoU": "mIoU",
    # Of a moving average of the weights (SOLVER.EMA_DECAY).
    "bbox_ema/AP": "AP (EMA)",
    "segm_ema/AP": "mask AP (EMA)",
    "keypoints_ema/AP": "keypoint AP (EMA)",
    "sem_seg_ema/mIoU": "mIoU (EMA)",
}


@dataclass(frozen=True)
class Comparison:
    """Two groups of a table. `caveats` are the config keys, apart from weights, that differ."""

    a: str
    b: str
    metrics: Mapping[str, Difference]
    caveats: Sequence[str]


@dataclass(frozen=True)
class Table:
    """The groups of one protocol on one data set.

    Attributes:
        comparisons: all pairs of groups.
        reference: published rows; only where some group follows the protocol exactly.
        reference_note: why published rows that exist are not shown.
        analysis: what the predictions show; None where no run kept any.
    """

    protocol: str
    dataset: str
    groups: Sequence[Group]
    comparisons: Sequence[Comparison] = ()
    reference: Sequence[Published] = ()
    reference_note: str | None = None
    analysis: Analysis | None = None

    def summaries(self, group: Group) -> dict[str, Summary]:
        """Mean and standard deviation of each metric that all runs of a group have."""
        return {metric: summarize(group.values(metric)) for metric in group.metrics()}

    def rows(self, columns: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
        """Head and rows, with the columns that some group has; published rows follow our own."""
        ours = [(g, self.summaries(g)) for g in self.groups]
        used = {m: title for m, title in columns.items() if any(m in s for _, s in ours)}
        rows = [
            [g.label, str(len(g.runs)), *(spread(s.get(metric)) for metric in used)]
            for g, s in ours
        ]
        for row in self.reference if columns is COLUMNS else ():
            cells = (f"{row.metrics[m]:.1f}" if m in row.metrics else "-" for m in used)
            rows.append([f"published: {row.weights}", str(row.n or "-"), *cells])
        return ["group", "n", *used.values()], rows


def build_tables(
    groups: Sequence[Group], folder: Path | None = None, num_images: int = 0
) -> tuple[list[Table], list[str]]:
    """One table per protocol and data set, in the order of the groups, with all pairs compared.

    Args:
        folder: where pictures of the predictions are written; None for no pictures.
        num_images: number of images of each kind to draw.

    Returns:
        The tables, and a sentence for each whose predictions could not be analysed.
    """
    members: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        members.setdefault(group.table, []).append(group)
    tables, notes = [], []
    for number, ((protocol, dataset), rivals) in enumerate(members.items()):
        analysis = None
        try:
            analysis = analyse_groups(rivals, folder, str(number), num_images)
        except (UserError, OSError) as error:
            notes.append(f"no analysis of {dataset}: {error}")
        comparisons = [
            _compare(*sorted(pair, key=_baseline_rank, reverse=True))
            for pair in itertools.combinations(rivals, 2)
        ]
        reference = _reference(protocol, dataset, rivals)
        tables.append(Table(protocol, dataset, rivals, comparisons, *reference, analysis))
    return tables, notes


def spread(summary: Summary | None) -> str:
    """`55.9 ± 0.2`, the bare value of a single run, or `-`."""
    if summary is None:
        return "-"
    return f"{summary.mean:.1f}" + (f" ± {summary.std:.1f}" if summary.std is not None else "")


def table_dict(table: Table) -> dict[str, Any]:
    """A table as plain values, including those of every single run."""
    groups = [
        {
            "label": group.label,
            "n": len(group.runs),
            "runs": [str(run.path) for run in group.runs],
            "seeds": [run.seed for run in group.runs],
            "weights": distinct(run.weights for run in group.runs),
            "deviations": group.deviations,
            "explanation": group.results.get("explanation"),
            "metrics": {
                metric: {**asdict(summary), "values": group.values(metric)}
                for metric, summary in table.summaries(group).items()
            },
            "per_class": [run.per_class() for run in group.runs],
        }
        for group in table.groups
    ]
    return {
        "protocol": table.protocol,
        "dataset": table.dataset,
        "groups": groups,
        "comparisons": [asdict(comparison) for comparison in table.comparisons],
        "published": [asdict(row) for row in table.reference],
        "published_note": table.reference_note,
        "analysis": table.analysis and table.analysis.as_dict(),
    }


def _reference(
    protocol: str, dataset: str, groups: Sequence[Group]
) -> tuple[Sequence[Published], str | None]:
    """Published rows to show, or the reason why those that exist are not shown."""
    rows = published(protocol, dataset)
    if not rows or any(g.deviations == [] and _is_resnet50(g) for g in groups):
        return rows, None
    return (), (
        f"Published numbers of {protocol} exist, but no run here follows the protocol with a "
        "ResNet-50 and without deviations: they are not comparable and not shown."
    )


def _is_resnet50(group: Group) -> bool:
    config = group.runs[0].config
    size = (config.get("MODEL.RESNETS.DEPTH"), config.get("MODEL.RESNETS.RES2_OUT_CHANNELS"))
    return size in ((50, 256), (None, None))


def _baseline_rank(group: Group) -> int:
    """Rank for the sign of differences: 0 for random weights, 1 for supervised, 2 for others."""
    results = group.results
    start = str(results.get("init") or split_name(str(results["protocol"] or ""))[1])
    if not group.runs[0].weights or start == "random":
        return 0
    return 1 if start == "supervised" else 2


def _compare(a: Group, b: Group) -> Comparison:
    shared = [metric for metric in a.metrics() if metric in set(b.metrics())]
    metrics = {m: welch_difference(a.values(m), b.values(m)) for m in shared}
    return Comparison(a.label, b.label, metrics, differing_keys(a, b))


def distinct(values: Iterable[Any]) -> list[str]:
    """The different values but None, as text, in the order of their first appearance."""
    return list(dict.fromkeys(str(value) for value in values if value is not None))
