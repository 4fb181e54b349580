"""Writers that send the scalars of a run to an experiment tracker: Weights & Biases or MLflow.

Where the tracker is, and whether it is reached at all, is for its own environment variables to say:
``WANDB_MODE=offline``, ``MLFLOW_TRACKING_URI``, ... The run's id in the tracker is kept in the run
directory, so that a resumed run continues there.
"""

import logging
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.utils.events import EventWriter, get_event_storage

from moco_common.dependencies import require
from moco_common.errors import UserError
from moco_common.files import read_json, write_json_atomically

log = logging.getLogger(__name__)
PROJECT = "moco-det"
IDS = "trackers.json"  # in the run directory: the run's id in each tracker


class Tracker(NamedTuple):
    """An open run in a tracker: its id, the functions that log and close it, and its errors."""

    id: str
    send: Callable[[Mapping[str, float], int], object]
    close: Callable[[], object]
    errors: type[Exception]


class TrackerWriter(EventWriter):
    """Sends every scalar that has changed since the last call. A tracker that fails is left with a
    warning: the run goes on, and ``metrics.json`` has everything."""

    def __init__(self, name: str, tracker: Tracker, start_iter: int, window: int = 20) -> None:
        self.name, self.tracker, self.window = name, tracker, window
        self._last, self._failed = start_iter - 1, False

    def write(self) -> None:
        if self._failed:
            return
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        storage = get_event_storage()
        for key, (value, iteration) in storage.latest_with_smoothing_hint(self.window).items():
            if iteration > self._last and math.isfinite(value):
                rows[iteration][key] = float(value)
        self._try(lambda: [self.tracker.send(rows[step], step) for step in sorted(rows)])
        self._last = max(rows, default=self._last)

    def close(self) -> None:
        if not self._failed:
            self._try(self.tracker.close)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except self.tracker.errors as error:
            self._failed = True
            log.warning("warning: %s failed and gets no more records: %s", self.name, error)


def check_trackers(names: list[str]) -> None:
    """Check that trackers are known and installed.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--log {name} is unknown: there are {' and '.join(TRACKERS)}.")
        require(f"--log {name}", name, f"its package: pip install 'moco-det[{name}]'.")


def build_trackers(
    names: list[str], folder: Path, config: Mapping[str, Any], start_iter: int
) -> list[TrackerWriter]:
    """Open the run in each tracker: again if it is resumed, else anew.

    Args:
        folder: the run directory, whose name the run has in the tracker.
        config: settings by key, to be recorded.
        start_iter: first iteration; 0 for a new run.

    Raises:
        UserError: a tracker cannot be reached.
    """
    file = folder / IDS
    ids = _ids(file) if start_iter and file.is_file() else {}
    writers = []
    for name in names:
        tracker = TRACKERS[name](folder, config, ids.get(name))
        ids[name] = tracker.id
        writers.append(TrackerWriter(name, tracker, start_iter))
    if names:
        write_json_atomically(file, ids)
    return writers


def _ids(file: Path) -> dict[str, str]:
    try:
        ids = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} ({error}): remove it to start new records.") from None
    if not isinstance(ids, dict) or not all(isinstance(value, str) for value in ids.values()):
        raise UserError(f"{file} does not hold an id per tracker: remove it to start new records.")
    return ids


def _wandb(folder: Path, config: Mapping[str, Any], known: str | None) -> Tracker:
    import wandb

    try:
        run = wandb.init(
            project=PROJECT,
            name=folder.name,
            dir=str(folder),
            config=dict(config),
            id=known,  # None: one that wandb chooses
            resume="allow",
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"--log wandb: {error}: log in with `wandb login`, or set WANDB_MODE=offline."
        ) from None
    return Tracker(
        run.id, lambda row, step: run.log(dict(row), step=step), run.finish, wandb.errors.Error
    )


def _mlflow(folder: Path, config: Mapping[str, Any], known: str | None) -> Tracker:
    import mlflow
    from mlflow.entities import Metric, Param

    client = mlflow.MlflowClient()
    try:
        number = known
        if number is None:
            experiment = mlflow.set_experiment(PROJECT)
            number = client.create_run(experiment.experiment_id, run_name=folder.name).info.run_id
            settings = [
                Param(key, str(value)[:500]) for key, value in config.items() if value != ""
            ]
            for first in range(0, len(settings), 100):  # the most that MLflow takes at once
                client.log_batch(number, params=settings[first : first + 100])
        else:
            client.update_run(number, status="RUNNING")
    except mlflow.MlflowException as error:
        raise UserError(f"--log mlflow: {error}: check MLFLOW_TRACKING_URI.") from None

    def send(row: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        names = {re.sub(r"[^\w\-. :/]", "_", key): value for key, value in row.items()}
        metrics = [Metric(key, value, now, step) for key, value in names.items()]
        for first in range(0, len(metrics), 1000):
            client.log_batch(number, metrics=metrics[first : first + 1000])

    return Tracker(number, send, lambda: client.set_terminated(number), mlflow.MlflowException)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], str | None], Tracker]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
}
