"""The best evaluation of a run: its weights are kept, and a run that stagnates stops."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from moco_common.errors import UserError

FILE = "model_best"
AVERAGE = "_ema"  # ending of a task whose scores are those of the moving average of the weights


class EarlyStop(BaseException):
    """Raised when an evaluation ends the run; not an error, and not logged as one."""

    def __init__(self, iterations: int) -> None:
        super().__init__(iterations)
        self.iterations = iterations  # that were done


class Selection:
    """The best evaluation so far by one metric, of which higher values are better.

    All ranks call `update` together and hold the same state, which belongs to the checkpoint.

    Args:
        metric: task and name, such as "bbox/AP" or, of the moving average, "bbox_ema/AP".
        patience: number of evaluations without a better one after which `exhausted` is true; 0 for
            never.
        save: writes the weights of the moving average (True) or the trained ones, with facts.
    """

    def __init__(self, metric: str, patience: int, save: Callable[..., None]) -> None:
        self.metric, self.patience, self.save = metric, patience, save
        self.value, self.iteration = -math.inf, 0
        self.waited = self.evaluated = 0

    @property
    def exhausted(self) -> bool:
        """True if the run has stagnated for as long as it may."""
        return 0 < self.patience <= self.waited

    def update(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Take note of an evaluation, and keep the weights if it is the best.

        Args:
            iteration: number of iterations that the model was trained for.
            results: scores by task on the first rank.

        Returns:
            The record of the best evaluation, for ``results.json``.

        Raises:
            UserError: on all ranks, if the evaluation has no such metric.
        """
        scores = {
            f"{task}/{name}": value
            for task, values in results.items()
            for name, value in values.items()
            if isinstance(value, float)
        }
        value, names = comm.all_gather((scores.get(self.metric), list(scores)))[0]
        if value is None:
            raise UserError(
                f"TEST.BEST_METRIC {self.metric} is no metric of the evaluation: choose one of "
                f"{', '.join(names)}, and resume with --resume."
            )
        if iteration > self.evaluated:  # else it was evaluated before the run was resumed
            self.evaluated = iteration
            self.waited += 1
            if value > self.value:  # never NaN, of a test set with nothing to find
                self.value, self.iteration, self.waited = value, iteration, 0
        if iteration == self.iteration:
            average = self.metric.partition("/")[0].endswith(AVERAGE)
            self.save(average, iteration=iteration - 1, **self.record())
        return self.record()

    def record(self) -> dict[str, Any]:
        """Return metric, value and iteration of the best evaluation."""
        return {
            "best_metric": self.metric,
            "best_value": self.value,
            "best_iteration": self.iteration,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the selection."""
        return {**self.record(), "waited": self.waited, "evaluated": self.evaluated}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; start anew with another metric."""
        if state["best_metric"] == self.metric:
            self.value, self.iteration = state["best_value"], state["best_iteration"]
            self.waited, self.evaluated = state["waited"], state["evaluated"]


def check_selection(cfg: CfgNode) -> None:
    """Check the keys of selection, early stopping and moving average before training.

    Raises:
        UserError: a value is out of range, or a key lacks another that it needs.
    """
    metric, patience, decay = cfg.TEST.BEST_METRIC, cfg.TEST.PATIENCE, cfg.SOLVER.EMA_DECAY
    if not 0 <= decay < 1:
        raise UserError(f"SOLVER.EMA_DECAY is {decay}: use a decay from 0 (no average) to 0.9999.")
    if patience < 0:
        raise UserError(f"TEST.PATIENCE is {patience}: use a number of evaluations, or 0.")
    if patience and not (metric and cfg.TEST.EVAL_PERIOD > 0):
        raise UserError(
            "TEST.PATIENCE counts evaluations during training: set TEST.BEST_METRIC, such as "
            "bbox/AP, and TEST.EVAL_PERIOD."
        )
    if not metric:
        return
    if not cfg.DATASETS.TEST:
        raise UserError("TEST.BEST_METRIC needs a test set: pass --test-data.")
    task, _, name = metric.partition("/")
    if not name:
        raise UserError(f"TEST.BEST_METRIC is {metric}: write TASK/METRIC, such as bbox/AP.")
    if task.endswith(AVERAGE) and not decay:
        raise UserError(f"TEST.BEST_METRIC {metric} needs a moving average: set SOLVER.EMA_DECAY.")
