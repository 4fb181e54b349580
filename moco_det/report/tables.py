"""The tables of a report: groups of runs beside each other and beside the papers' numbers."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moco_common.text import counted
from moco_det.config.protocols import split_name
from moco_det.report.error_analysis import RunAnalysis
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
}


@dataclass(frozen=True)
class Comparison:
    """Two groups of one table. `caveats` are config keys in which they differ beyond weights."""

    a: str
    b: str
    metrics: Mapping[str, Difference]
    caveats: Sequence[str]


@dataclass
class Table:
    """The groups of one protocol on one data set, and what the papers say about it.

    `reference` holds published rows, and only where some group follows the protocol without
    deviations; `reference_note` says in a sentence why there are none, if there could be.
    The rest is filled by :func:`moco_det.report.analyse.analyse_tables`, where the predictions
    were kept: an analysis for each run of a group, by its label; `images`, the file names of the
    best and worst images; `figures`, caption -> picture.
    """

    protocol: str
    dataset: str
    groups: list[Group]
    comparisons: list[Comparison] = field(default_factory=list)
    reference: list[Published] = field(default_factory=list)
    reference_note: str | None = None
    class_names: Sequence[str] = ()
    analyses: dict[str, list[RunAnalysis]] = field(default_factory=dict)
    images: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: dict[str, Path] = field(default_factory=dict)

    def summaries(self, group: Group) -> dict[str, Summary]:
        """Mean and deviation of each metric that a group's runs have."""
        return {metric: summarize(group.values(metric)) for metric in group.metrics()}

    def rows(self, columns: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the columns that any group has; ours first, published below."""
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


def build_tables(groups: Sequence[Group]) -> list[Table]:
    """One table for each protocol and data set, in the order of the groups, all pairs compared."""
    tables: dict[tuple[str, str], Table] = {}
    for group in groups:
        tables.setdefault(group.table, Table(*group.table, groups=[])).groups.append(group)
    for table in tables.values():
        _add_reference(table)
        table.comparisons = [
            _compare(*sorted(pair, key=_baseline_rank, reverse=True))
            for pair in itertools.combinations(table.groups, 2)
        ]
    return list(tables.values())


def spread(summary: Summary | None) -> str:
    """`55.9 ± 0.2`, or the bare value of a single run, or `-`."""
    if summary is None:
        return "-"
    return f"{summary.mean:.1f}" + (f" ± {summary.std:.1f}" if summary.std is not None else "")


def comparison_lines(table: Table) -> list[str]:
    """One sentence for each pair of groups."""
    lines = []
    for pair in table.comparisons:
        parts = [f"{COLUMNS[m]} {_signed(d)}" for m, d in pair.metrics.items() if m in COLUMNS]
        line = f"{pair.a} minus {pair.b}: {', '.join(parts)}"
        reasons = {d.why_no_interval for d in pair.metrics.values()}
        if "n = 1" in reasons:
            line += "; no interval, for a single run (n = 1) says nothing of the spread"
        elif "no spread" in reasons:
            line += "; no interval where the runs show no spread"
        if pair.caveats:
            more = f" and {len(pair.caveats) - 5} more" if len(pair.caveats) > 5 else ""
            line += f". They also differ in {', '.join(pair.caveats[:5])}{more}"
        lines.append(line + ".")
    return lines


def provenance_lines(table: Table) -> list[str]:
    """What each group is: weights, seeds, iterations, commit, deviations from the protocol."""
    lines = []
    for group in table.groups:
        facts = [f"weights {' and '.join(_distinct(r.weights or 'random' for r in group.runs))}"]
        seeds = ["unknown" if run.seed is None else str(run.seed) for run in group.runs]
        facts.append(f"seed {', '.join(seeds)}")
        for key in ("iteration", "commit", "hardware"):
            values = _distinct((run.results or {}).get(key) for run in group.runs)
            values = [value[:10] for value in values] if key == "commit" else values
            facts += [f"{key} {' and '.join(values)}"] if values else []
        if not table.protocol:
            facts.append("follows no protocol")
        elif group.deviations is None:
            facts.append("deviations not recorded")
        elif group.deviations:
            facts.append(
                f"deviates from {table.protocol} in {counted(len(group.deviations), 'key')}"
            )
        else:
            facts.append(f"exactly {table.protocol}")
        lines.append(f"{group.label}: {'; '.join(facts)}.")
    return lines


def table_dict(table: Table) -> dict[str, Any]:
    """A table as plain values, every single value included."""
    groups = [
        {
            "label": group.label,
            "n": len(group.runs),
            "runs": [str(run.path) for run in group.runs],
            "seeds": [run.seed for run in group.runs],
            "weights": _distinct(run.weights for run in group.runs),
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
    }


def _add_reference(table: Table) -> None:
    rows = published(table.protocol, table.dataset)
    if rows and any(g.deviations == [] and _is_resnet50(g) for g in table.groups):
        table.reference = rows
    elif rows:
        table.reference_note = (
            f"Published numbers of {table.protocol} exist, but no run here follows the protocol "
            "with a ResNet-50 and without deviations: they are not comparable and not shown."
        )


def _is_resnet50(group: Group) -> bool:
    config = group.runs[0].config
    size = (config.get("MODEL.RESNETS.DEPTH"), config.get("MODEL.RESNETS.RES2_OUT_CHANNELS"))
    return size in ((50, 256), (None, None))


def _baseline_rank(group: Group) -> int:
    """Baselines are subtracted: random weights from supervised ones, and both from the rest."""
    results = group.results
    start = str(results.get("init") or split_name(str(results["protocol"] or ""))[1])
    if not group.runs[0].weights or start == "random":
        return 0
    return 1 if start == "supervised" else 2


def _compare(a: Group, b: Group) -> Comparison:
    shared = [metric for metric in a.metrics() if metric in set(b.metrics())]
    metrics = {m: welch_difference(a.values(m), b.values(m)) for m in shared}
    return Comparison(a.label, b.label, metrics, differing_keys(a, b))


def _signed(difference: Difference) -> str:
    text = f"{difference.mean:+.1f}"
    if difference.interval:
        text += f" [{difference.interval[0]:+.1f}, {difference.interval[1]:+.1f}]"
    return text


def _distinct(values: Iterable[Any]) -> list[str]:
    return [str(value) for value in dict.fromkeys(v for v in values if v is not None)]
