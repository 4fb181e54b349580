"""Hooks between iterations: precise BN statistics, checkpoints, records, evaluation."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from moco_common.errors import UserError
from moco_common.files import full_disk_explained, parse_json, read_text, replace_text
from moco_common.stopping import Stopped, StopRequest
from moco_det.checkpoint.run_checkpointer import RunCheckpointer
from moco_det.data.samplers import PRECISE_BN, Batch, seed_model
from moco_det.engine.selection import EarlyStop, Selection
from moco_det.modeling.batch_norm import update_statistics

log = logging.getLogger(__name__)


def is_due(iteration: int, period: int, max_iter: int) -> bool:
    """Return whether a periodic action is due after an iteration; always True after the last."""
    done = iteration + 1
    return done >= max_iter or (period > 0 and done % period == 0)


class PreciseBN(HookBase):
    """Recompute the BN statistics before every evaluation, each time over the same images.

    Args:
        period: number of iterations between evaluations; 0 if only the last model is evaluated.
        model: the model in training mode, not wrapped in DDP.
        batches: function that iterates over this process's micro-batches, as ``(number, batch)``.
        seed: seed of the run.
        images: number of images over all processes, for the log.
    """

    def __init__(
        self,
        period: int,
        model: nn.Module,
        batches: Callable[[], Iterator[tuple[int, Batch]]],
        *,
        seed: int,
        images: int,
    ) -> None:
        self.period, self.model, self.batches = period, model, batches
        self.seed, self.images = seed, images

    def of(self, model: nn.Module) -> "PreciseBN":
        """Return the same for another model."""
        return PreciseBN(self.period, model, self.batches, seed=self.seed, images=self.images)

    def after_step(self) -> None:
        if is_due(self.trainer.iter, self.period, self.trainer.max_iter):
            self.update_stats()

    def update_stats(self) -> None:
        """Recompute the statistics of all BN layers; a model without BN is left unchanged."""
        if not get_bn_modules(self.model):
            return
        log.info("precise BN over %d images", self.images)
        with EventStorage():  # keeps the model's events out of the training metrics
            update_statistics(self.model, self._inputs())

    def _inputs(self) -> Iterator[Batch]:
        for number, batch in self.batches():
            seed_model(self.seed, PRECISE_BN, number)
            yield batch


class Checkpoints(HookBase):
    """Save a checkpoint periodically, at the end, and when the run is asked to stop.

    Every rank must register this hook, because stopping is a collective decision; rank 0 writes.
    """

    def __init__(self, checkpointer: RunCheckpointer, period: int, stop: StopRequest) -> None:
        self.checkpointer, self.period, self.stop = checkpointer, period, stop

    def after_step(self) -> None:
        iteration, final = self.trainer.iter, self.trainer.iter + 1 >= self.trainer.max_iter
        asked = self.stop.agreed()
        if asked or is_due(iteration, self.period, self.trainer.max_iter):
            self._check_finite(iteration)
            name = "model_final" if final else f"model_{iteration:07d}"
            self.checkpointer.save(name, iteration=iteration)
        if asked:
            self.stop.finish()
            comm.synchronize()  # no rank ends the job before the file is written
            raise Stopped(asked)

    def _check_finite(self, iteration: int) -> None:
        """Raise if a weight is not finite, which the loss shows one iteration later at best."""
        state = self.checkpointer.model.state_dict()
        wrong = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
        if wrong:
            raise UserError(
                f"{wrong[0]} is not finite after iteration {iteration + 1}, so no checkpoint was "
                "saved: lower SOLVER.BASE_LR and pass --resume to resume from the previous one."
            )


class Writers(hooks.PeriodicWriter):
    """Detectron2's periodic writers; a full disk is reported as a `UserError`.

    Args:
        writers: writers of the progress line, ``metrics.json`` and TensorBoard events.
        period: number of iterations between records.
        folder: the run directory.
    """

    def __init__(self, writers: Sequence[EventWriter], period: int, folder: Path) -> None:
        super().__init__(list(writers), period)
        self.writers, self.folder = writers, folder

    def after_step(self) -> None:
        with full_disk_explained(self.folder):
            super().after_step()

    def after_train(self) -> None:
        # Close all, whichever fails: Python complains about a file left open with unwritten lines.
        with full_disk_explained(self.folder), ExitStack() as closing:
            for writer in self.writers:
                closing.callback(writer.close)
            for writer in self.writers:
                writer.write()


class Evaluation(HookBase):
    """Evaluate periodically and after training, and stop a run that stagnates.

    Unlike Detectron2's ``EvalHook``, it does not evaluate if the last iteration was interrupted.
    During the final evaluation a signal ends the process at once: the model is already saved.

    Args:
        period: number of iterations between evaluations; 0 to evaluate only after training.
        evaluate: function of the number of iterations done that returns nested results, such as
            ``{"bbox": {"AP": 40.2}}``.
        stop: the run's stop request.
        selection: updated by ``evaluate``, and saved with this hook; None without selection.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[int], dict[str, Any]],
        stop: StopRequest,
        selection: Selection | None = None,
    ) -> None:
        self.period, self.evaluate, self.stop = period, evaluate, stop
        self.selection = selection

    def before_train(self) -> None:
        """Repeat the evaluation that followed the checkpoint: its outcome is not in it."""
        done = self.trainer.start_iter
        if self.selection and done > self.selection.evaluated and self._is_due(done):
            self.evaluate(done)
            self._stop_if_exhausted(done)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._is_due(done):
            self._evaluate(done)
            self._stop_if_exhausted(done)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # False after an exception
            self.stop.obey()
            self._evaluate(self.trainer.max_iter)

    def _is_due(self, done: int) -> bool:
        return 0 < done < self.trainer.max_iter and self.period > 0 and done % self.period == 0

    def _evaluate(self, done: int) -> None:
        numbers = {
            name: float(value)
            for name, value in flatten_results_dict(self.evaluate(done)).items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        self.trainer.storage.put_scalars(**numbers, smoothing_hint=False)
        comm.synchronize()

    def _stop_if_exhausted(self, done: int) -> None:
        if self.selection and self.selection.exhausted:
            raise EarlyStop(done)

    def state_dict(self) -> dict[str, Any]:
        return self.selection.state_dict() if self.selection else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.selection:
            self.selection.load_state_dict(state_dict)


def truncate_metrics(path: Path, iteration: int) -> None:
    """Drop the lines of ``metrics.json`` that a run resumed at ``iteration`` will write again, and
    incomplete ones."""
    if not path.is_file():
        return
    kept = []
    for line in read_text(path).splitlines():
        try:
            if parse_json(line)["iteration"] < iteration:
                kept.append(line + "\n")
        except (ValueError, LookupError, TypeError):
            continue
    replace_text(path, "".join(kept))
