"""The fine-tuning loop: Detectron2's ``TrainerBase`` with resumable, reproducible training.

``build_trainer`` and ``evaluate`` read the config; ``Trainer`` takes explicit arguments.
"""

import logging
import weakref
from collections import ChainMap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.engine import HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import inference_on_dataset
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from torch import nn
from torch.optim.swa_utils import AveragedModel

from moco_common.errors import lost_worker_explained
from moco_common.hardware import cpu_count
from moco_common.progress import Loop
from moco_common.stopping import Stopped, StopRequest
from moco_det.checkpoint.run_checkpointer import RunCheckpointer
from moco_det.config.defaults import flatten, is_semantic_model
from moco_det.config.key_descriptions import explanation
from moco_det.data.dataset_mapper import build_test_mapper, build_train_mapper
from moco_det.data.samplers import (
    PRECISE_BN,
    TRAINING,
    TrainingSet,
    load_training_set,
    numbers,
    share,
)
from moco_det.engine.console_log import ProgressPrinter, TerminalBar, printing_to_log
from moco_det.engine.hooks import Checkpoints, Evaluation, PreciseBN, Writers, truncate_metrics
from moco_det.engine.moving_average import MovingAverage, averaged
from moco_det.engine.optimizer import build_optimizer
from moco_det.engine.resume import changes_of_data, fingerprint, fingerprint_of_test_set
from moco_det.engine.selection import AVERAGE, EarlyStop, Selection
from moco_det.engine.selection import FILE as BEST
from moco_det.engine.trackers import build_trackers
from moco_det.engine.train_step import TrainStep, precision
from moco_det.evaluation.build import build_evaluator, evaluated_tasks
from moco_det.evaluation.results import headline, results_folder, with_classes_apart, write_results
from moco_det.evaluation.unreadable_images import (
    LeavingOutUnreadable,
    left_out,
    map_or_leave_out,
)
from moco_det.modeling.batch_norm import norm_notes, replace_sync_bn
from moco_det.modeling.detector import assert_all_trained

log = logging.getLogger(__name__)


class Trainer(TrainerBase):
    """A training run: step, schedule, checkpoints and hooks, on one process or under DDP.

    It replaces ``DefaultTrainer``, whose constructor passes DDP a device id, which fails on CPUs.
    State and files are the same, and enough to resume a run exactly: images and random numbers are
    functions of the seed and the iteration.

    Args:
        step: optimisation step, which owns the (wrapped) model, batches and optimizer.
        scheduler: learning-rate scheduler, stepped by the ``LRScheduler`` hook.
        model: the model itself, not wrapped in DDP.
        max_iter: length of the schedule, in iterations.
        output_dir: the run directory.
        data, test_data: fingerprints of the two sets, saved and compared when the run is resumed.
        selection: of the best evaluation, which may end the run early; None without one.
        average: moving average of the weights; None without one.
    """

    def __init__(
        self,
        step: TrainStep,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        model: nn.Module,
        max_iter: int,
        output_dir: str,
        data: Mapping[str, int | str],
        selection: Selection | None = None,
        average: AveragedModel | None = None,
        test_data: Mapping[str, int | str] | None = None,
    ) -> None:
        super().__init__()
        self.selection, self.average = selection, average
        self.data, self.test_data = dict(data), dict(test_data or {})
        self.step = step
        self.scheduler = scheduler
        self.model = model
        self.max_iter = max_iter
        self.stop = StopRequest()
        # A proxy, because the trainer owns the checkpointer.
        self.checkpointer = RunCheckpointer(model, output_dir, trainer=weakref.proxy(self))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.step.optimizer

    def run_step(self) -> None:
        self.storage.put_scalars(**self.step(self.iter))

    def resume(self) -> bool:
        """Resume from the newest checkpoint of the run directory; False if there is none."""
        if self.checkpointer.load_newest() is None:
            return False
        self.start_iter = self.iter + 1  # the checkpoint holds the last iteration completed
        return True

    @property
    def finished(self) -> bool:
        """True if the run was trained to its end, or to its early end."""
        stagnates = self.selection is not None and self.selection.exhausted
        return self.start_iter >= self.max_iter or stagnates

    def fit(self) -> None:
        """Train from ``start_iter`` to ``max_iter``.

        Raises:
            UserError: an image cannot be read, or a loss or weight is not finite.
            Stopped: a signal ended the run; its state is saved.
        """
        self.step.start(self.start_iter, self.max_iter, self.stop.waiting)
        self.step.model.train()
        try:
            with self.stop, lost_worker_explained():
                self.train(self.start_iter, self.max_iter)
        except Stopped as stopped:
            if stopped.message:  # while it waited for data: nothing more was saved
                raise
            # After the last line of progress.
            done = min(self.iter + 1, self.max_iter)
            log.warning("stopped    after iteration %d, saved: continue with --resume", done)
            raise
        except EarlyStop as early:
            self._end_early(early.iterations)
        finally:
            self.step.close()

    def _end_early(self, iterations: int) -> None:
        """Save the state after an evaluation that ends the run as its final one."""
        assert self.selection is not None
        self.iter = iterations - 1
        self.checkpointer.save("model_final", iteration=self.iter)
        log.info(
            "early stop after iteration %d: %d evaluations without a better %s than %.2f "
            "(iteration %d, in %s.pth)",
            *(iterations, self.selection.waited, self.selection.metric, self.selection.value),
            *(self.selection.iteration, BEST),
        )

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "_trainer": self.step.state_dict()}
        return {**state, "data": self.data, "test_data": self.test_data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if type(state_dict["iteration"]) is not int or state_dict["iteration"] < 0:
            raise ValueError(f"its iteration is {state_dict['iteration']!r:.40}")
        rates = self.scheduler.base_lrs
        super().load_state_dict(state_dict)
        self.step.load_state_dict(state_dict["_trainer"])
        # The config's schedule may have changed, and both states hold rates of the old one.
        self.scheduler.base_lrs = rates
        for group, base, rate in zip(
            self.optimizer.param_groups, rates, self.scheduler.get_lr(), strict=True
        ):
            group.update(initial_lr=base, lr=rate)
        if changed := changes_of_data(state_dict.get("data", self.data), self.data):
            log.warning("warning: the training data changed since the run started: %s", changed)
        before = state_dict.get("test_data", {})  # absent in earlier versions
        same = bool(self.test_data) and before.get("dataset") == self.test_data["dataset"]
        if same and (changed := changes_of_data(before, self.test_data)):
            log.warning("warning: the test data changed since the run started: %s", changed)


def build_trainer(
    cfg: CfgNode,
    model: nn.Module,
    *,
    training_set: TrainingSet | None = None,
    resume: bool = False,
) -> Trainer:
    """Build the trainer of a loaded model.

    Args:
        cfg: the config of the run, whose data sets are registered.
        model: model from :func:`build_detector` with loaded weights, not wrapped in DDP.
        training_set: the images, if already loaded.
        resume: whether to resume from the newest checkpoint of the run, if any.

    Raises:
        UserError: a layer is frozen, or the batch cannot be split over processes and passes.
    """
    assert_all_trained(model, cfg.MODEL.BACKBONE.FREEZE_AT)
    world_size = comm.get_world_size()
    per_pass, passes = share(cfg, world_size), cfg.SOLVER.ACCUMULATION_STEPS
    on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
    if world_size > 1 and on_cpu:
        replace_sync_bn(model)
    for line in norm_notes(model, per_pass=per_pass, passes=passes, world_size=world_size):
        log.info("norms      %s", line)
    if cfg.SOLVER.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(cfg, model)
    wrapped = create_ddp_model(
        model, broadcast_buffers=False, device_ids=None if on_cpu else [comm.get_local_rank()]
    )
    training_set = training_set or load_training_set(cfg)
    batches = partial(
        training_set.batches,
        build_train_mapper(cfg),
        per_pass,
        seed=cfg.SEED,
        num_workers=min(cfg.DATALOADER.NUM_WORKERS, cpu_count()),
    )
    ranks = {"passes": passes, "rank": comm.get_rank(), "world_size": world_size}
    step = TrainStep(
        wrapped,
        lambda first, last: batches(sequence=TRAINING, numbers=numbers(first, last, **ranks)),
        optimizer,
        passes=passes,
        seed=cfg.SEED,
        dtype=precision(cfg),
    )
    average = averaged(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None
    trainer = Trainer(
        step,
        build_lr_scheduler(cfg, optimizer),
        model,
        cfg.SOLVER.MAX_ITER,
        cfg.OUTPUT_DIR,
        fingerprint(training_set),
        selection=_build_selection(cfg, model, average),
        average=average,
        test_data=fingerprint_of_test_set(*cfg.DATASETS.TEST)
        if cfg.DATASETS.TEST and comm.is_main_process()
        else None,
    )
    precise = None
    if cfg.TEST.PRECISE_BN.ENABLED:
        count = cfg.TEST.PRECISE_BN.NUM_ITER
        images, available = count * cfg.SOLVER.IMS_PER_BATCH, len(training_set.images)
        if images > available:
            log.info(
                "norms      precise BN shows %d batches of %d images before each evaluation, each "
                "of the %d training images %.0f times: a lower TEST.PRECISE_BN.NUM_ITER is faster",
                *(count, cfg.SOLVER.IMS_PER_BATCH, available, images / available),
            )
        precise = PreciseBN(
            cfg.TEST.EVAL_PERIOD,
            model,
            lambda: trainer.stop.waiting(
                batches(sequence=PRECISE_BN, numbers=numbers(0, count, **ranks))
            ),
            seed=cfg.SEED,
            images=images,
        )
    if comm.is_main_process():
        trainer.register_hooks([TerminalBar()])  # first, so that it agrees with the progress line
    trainer.register_hooks(_build_hooks(cfg, trainer, precise))
    if resume and trainer.resume():
        log.info("resumed    at iteration %d of %d", trainer.start_iter, trainer.max_iter)
    if comm.is_main_process():
        trainer.register_hooks([_build_writer(cfg, trainer.start_iter)])
    return trainer


def _build_hooks(
    cfg: CfgNode, trainer: Trainer, precise: PreciseBN | None
) -> Sequence[HookBase | None]:
    """Return the hooks in Detectron2's order; the writers follow."""
    proxy = weakref.proxy(trainer)

    def test(done: int) -> dict[str, Any]:
        return evaluate(
            cfg,
            proxy.model,
            iteration=done,
            average=proxy.average and proxy.average.module,
            selection=proxy.selection,
        )

    period = cfg.TEST.EVAL_PERIOD
    averaging = None
    if trainer.average is not None:
        statistics = precise and precise.of(trainer.average.module)
        averaging = MovingAverage(
            trainer.average, trainer.model, statistics, trainer.checkpointer, period
        )
    evaluation = None
    if cfg.DATASETS.TEST:
        evaluation = Evaluation(period, test, trainer.stop, trainer.selection)
    return [
        hooks.IterationTimer(),
        hooks.LRScheduler(),
        precise,
        averaging,
        Checkpoints(trainer.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, trainer.stop),
        evaluation,
    ]


def _build_selection(
    cfg: CfgNode, model: nn.Module, average: AveragedModel | None
) -> Selection | None:
    if not cfg.TEST.BEST_METRIC:
        return None
    checkpointer = RunCheckpointer(model, cfg.OUTPUT_DIR)

    def keep(of_average: bool, **facts: Any) -> None:
        chosen = average.module if of_average and average is not None else model
        checkpointer.save_weights(BEST, chosen, **facts)

    return Selection(cfg.TEST.BEST_METRIC, cfg.TEST.PATIENCE, keep)


def _build_writer(cfg: CfgNode, start_iter: int) -> HookBase:
    metrics = Path(cfg.OUTPUT_DIR, "metrics.json")
    truncate_metrics(metrics, start_iter)
    writers = [
        ProgressPrinter(cfg.SOLVER.MAX_ITER),
        JSONWriter(str(metrics)),
        TensorboardXWriter(cfg.OUTPUT_DIR),
        *build_trackers(cfg.TRACKERS, metrics.parent, flatten(cfg), start_iter),
    ]
    return Writers(writers, cfg.LOG_PERIOD, metrics.parent)


def evaluate(
    cfg: CfgNode,
    model: nn.Module,
    *,
    iteration: int | None = None,
    average: nn.Module | None = None,
    selection: Selection | None = None,
) -> dict[str, Any]:
    """Evaluate on the test set and write ``results.json`` to its `results_folder`.

    Args:
        cfg: the config of the run, whose test set is registered.
        model: the detector. All ranks must call this; each evaluates its share of the images.
        iteration: number of training iterations, for the record.
        average: moving average of its weights, whose scores are those of the tasks ``bbox_ema``,
            ``segm_ema``, ...
        selection: notes the scores, and adds the best ones to the record.

    Returns:
        ``{"bbox": {"AP": ..., "AP50": ..., "AP75": ..., "per_class": {...}}, "segm": {...}}`` on
        rank 0, AP in percent; an empty dict on the others.
    """
    (name,) = cfg.DATASETS.TEST
    folder = results_folder(cfg.OUTPUT_DIR, name)
    results, unreadable = _scores(cfg, model, name, folder / "inference")
    if average is not None:
        scores, _ = _scores(cfg, average, name, folder / "inference-ema")
        results |= {f"{task}{AVERAGE}": of_task for task, of_task in scores.items()}
    best = None
    if selection is not None and iteration is not None:
        best = selection.update(iteration, results)
    if not comm.is_main_process():
        return {}
    for task, scores in results.items():
        log.info("%-10s %s", task, headline(scores))
    if unreadable:
        log.warning("warning: %s", unreadable)
    sentences = [*explanation(cfg), *([unreadable] if unreadable else [])]
    write_results(cfg, results, name, iteration, sentences, folder, best)
    if folder != Path(cfg.OUTPUT_DIR):
        log.info("results    written to %s: this is not the run's own test set", folder)
    return results


def _scores(
    cfg: CfgNode, model: nn.Module, name: str, predictions: Path
) -> tuple[dict[str, Any], str]:
    """Return the scores by task on the first rank, an empty dict on the others; and a sentence on
    the images that cannot be read, if any."""
    evaluator = build_evaluator(
        name,
        tasks=evaluated_tasks(cfg, name),
        output_dir=str(predictions),
        sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )
    loader = build_detection_test_loader(
        cfg,
        name,
        mapper=partial(map_or_leave_out, build_test_mapper(cfg)),
        num_workers=min(cfg.DATALOADER.NUM_WORKERS, cpu_count()),
    )
    tolerant = LeavingOutUnreadable(model, semantic=is_semantic_model(cfg))
    loop = Loop("evaluating", len(loader), say=log.info, period=10.0)
    with printing_to_log(), lost_worker_explained():  # pycocotools prints
        results = inference_on_dataset(tolerant, loader, evaluator, {"after_inference": loop.tick})
    reasons = dict(ChainMap(*comm.all_gather(tolerant.reasons)))
    unreadable = left_out(reasons, len(DatasetCatalog.get(name))) if reasons else ""
    if not comm.is_main_process():
        return {}, unreadable
    return {task: with_classes_apart(scores) for task, scores in results.items()}, unreadable
