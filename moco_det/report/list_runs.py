"""An overview of the runs below a folder, pre-training and fine-tuning, finished or not."""

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate

from moco_common.errors import UserError
from moco_common.run_lock import FINE_TUNING, PRETRAINING, is_in_use, kind_of_run
from moco_common.text import counted, duration
from moco_det.report.runs import Run, is_number, read_run
from moco_det.report.tables import COLUMNS

# Folders inside a run that hold no run of their own.
_INSIDE = ("inference", "inspection", "slurm")
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\.")


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        run: its directory, relative to the folder that was searched.
        kind: "pre-training" or "fine-tuning".
        state: "done", "running" or "stopped".
        setting: method of a pre-training run, protocol of a fine-tuning run.
        weights: what it started from; "random" for random weights.
        seed: None if it is unknown or was drawn at random.
        score: kNN accuracy of a pre-training run, AP (or mIoU) of a fine-tuning run, in percent;
            None before the first evaluation.
        metric: name of the score.
        iteration: number of completed iterations that were logged.
        iterations: length of the run; None if it is unknown.
        seconds: from the first start to the last record; None if it is unknown.
    """

    run: str
    kind: str
    state: str
    setting: str
    weights: str
    seed: int | None
    score: float | None
    metric: str
    iteration: int
    iterations: int | None
    seconds: float | None


NAMES = tuple(Row.__dataclass_fields__)


def list_runs(folder: Path) -> list[Row]:
    """Return a row for each run in ``folder`` and below, in the order of the paths.

    Files that cannot be read leave gaps in a row; nothing is changed.
    """
    return [_row(path, str(path.relative_to(folder))) for path in _run_folders(folder)]


def arrange(rows: Sequence[Row], conditions: Sequence[str], order: str = "run") -> list[Row]:
    """Return the rows that satisfy all conditions, sorted.

    Args:
        conditions: ``NAME=TEXT``; the value of that column contains the text, in any case.
        order: a column, ascending; ``-NAME`` for descending. Gaps come last.

    Raises:
        UserError: there is no such column, or a condition has no ``=``.
    """
    for condition in conditions:
        name, equals, text = condition.partition("=")
        if not equals:
            raise UserError(f"--filter {condition} is not NAME=TEXT, such as state=done.")
        _check_name(name, "--filter")
        rows = [row for row in rows if text.lower() in str(getattr(row, name)).lower()]
    name = order.removeprefix("-")
    _check_name(name, "--sort")
    known = [row for row in rows if getattr(row, name) is not None]
    gaps = [row for row in rows if getattr(row, name) is None]
    return sorted(known, key=lambda row: getattr(row, name), reverse=order[:1] == "-") + gaps


def as_table(rows: Sequence[Row]) -> str:
    """Return the rows as text, one line each."""
    cells = [
        [
            row.run,
            row.kind,
            row.state,
            row.setting,
            row.weights,
            "-" if row.seed is None else row.seed,
            "-" if row.score is None else f"{row.metric} {row.score:.1f}",
            f"{row.iteration}/{row.iterations or '?'}",
            "-" if row.seconds is None else duration(row.seconds),
        ]
        for row in rows
    ]
    head = ["run", "kind", "state", "setting", "weights", "seed", "score", "iteration", "time"]
    table = tabulate(cells, head, tablefmt="simple", disable_numparse=True)
    return f"{table}\n{counted(len(rows), 'run')}"


def as_json(rows: Sequence[Row]) -> str:
    """Return the rows as a JSON list of objects."""
    return json.dumps([asdict(row) for row in rows], indent=2)


def _check_name(name: str, option: str) -> None:
    if name not in NAMES:
        raise UserError(f"{option} {name} is not a column: choose one of {', '.join(NAMES)}.")


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in _INSIDE and not f.startswith("."))
        known = kind_of_run(Path(path)) in (PRETRAINING, FINE_TUNING)
        if known and not {"config.yaml", "metrics.json", "results.json"}.isdisjoint(files):
            yield Path(path)


def _row(path: Path, name: str) -> Row:
    run = read_run(path)
    pretraining = kind_of_run(path) == PRETRAINING
    score, metric = _score(run, pretraining)
    done, total = _progress(run, pretraining)
    finished = (total is not None and done >= total) or run.results is not None
    state = "running" if is_in_use(path) else "done" if finished else "stopped"
    setting = run.config.get("METHOD") if pretraining else (run.results or {}).get("protocol")
    return Row(
        name,
        PRETRAINING if pretraining else FINE_TUNING,
        state,
        str(setting or "-"),
        run.weights or "random",
        run.seed,
        score,
        metric,
        done,
        total,
        _seconds(path),
    )


def _score(run: Run, pretraining: bool) -> tuple[float | None, str]:
    if pretraining:
        found = run.series("knn_top1")[1]
        return (found[-1] if found else None), "kNN"
    scores = run.scores()
    return next(
        ((scores[key], title) for key, title in COLUMNS.items() if key in scores), (None, "")
    )


def _progress(run: Run, pretraining: bool) -> tuple[int, int | None]:
    """Return the number of completed iterations and that of all."""
    last = run.records[-1] if run.records else {}
    logged = int(last.get("iteration", 0 if pretraining else -1))
    limit = run.config.get("SOLVER.MAX_ITER")
    limit = int(limit) if is_number(limit) and limit > 0 else None
    if not pretraining:  # counted from 0; the evaluation's record counts the whole run
        done = logged + ("total_loss" in last or not last)
        return (min(done, limit) if limit else done), limit
    epochs, epoch = run.config.get("SOLVER.EPOCHS"), last.get("epoch")
    if is_number(epochs) and epochs > 0 and is_number(epoch) and epoch > 0:
        whole = round(logged * epochs / epoch)
        limit = min(limit, whole) if limit else whole
    return logged, limit


def _seconds(path: Path) -> float | None:
    started = [int(m[1]) for file in path.iterdir() if (m := _EVENTS.match(file.name))]
    ends = [
        file.stat().st_mtime
        for name in ("metrics.json", "results.json")
        if (file := path / name).is_file()
    ]
    if not started or not ends:
        return None
    seconds = max(ends) - min(started)
    return seconds if 0 <= seconds <= time.time() else None
