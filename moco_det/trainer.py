"""Detectron2's training loop with what transfer needs: all layers trained, true batch statistics.

``build_trainer`` and ``evaluate`` read the config; ``Trainer`` takes explicit arguments.
"""

import logging
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import (
    AMPTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    hooks,
)
from detectron2.evaluation import inference_on_dataset
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from .checkpoint import RunCheckpointer
from .detector import assert_all_trained
from .evaluation import build_evaluator
from .progress import ProgressPrinter, Ticker, printing_to_log
from .results import write_results

log = logging.getLogger(__name__)


class Trainer(TrainerBase):
    """A training run: step, schedule, checkpoints and hooks, on one process or under DDP.

    Not ``DefaultTrainer``: its constructor gives DDP a device id, which processes on CPUs have
    not. State and files are the same.

    Args:
        step: runs one iteration; owns model, data loader and optimizer.
        scheduler: learning-rate scheduler, stepped by the ``LRScheduler`` hook.
        model: the bare model, not wrapped in DDP.
        max_iter: length of the schedule.
        output_dir: the run directory.
    """

    def __init__(
        self,
        step: SimpleTrainer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        model: nn.Module,
        max_iter: int,
        output_dir: str,
    ) -> None:
        super().__init__()
        self.step = step
        self.scheduler = scheduler
        self.max_iter = max_iter
        # A proxy: the trainer owns the checkpointer.
        self.checkpointer = RunCheckpointer(model, output_dir, trainer=weakref.proxy(self))

    @property
    def model(self) -> nn.Module:
        return self.step.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.step.optimizer

    def run_step(self) -> None:
        self.step.iter = self.iter
        self.step.run_step()

    def resume(self) -> bool:
        """Go on from the newest checkpoint of the run directory; False where there is none."""
        if not self.checkpointer.has_checkpoint():
            return False
        self.checkpointer.load(self.checkpointer.get_checkpoint_file())
        self.start_iter = self.iter + 1  # the checkpoint holds the iteration that was just done
        return True

    def fit(self) -> None:
        """Train from ``start_iter`` to ``max_iter``."""
        self.train(self.start_iter, self.max_iter)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "_trainer": self.step.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.step.load_state_dict(state_dict["_trainer"])


class PreciseBN(hooks.PreciseBN):
    """Detectron2's PreciseBN, after which every rank holds the same statistics.

    Each rank estimates them from its own images; left so, ranks would evaluate different models
    and only the first one's would be saved. Here the ranks' moments are averaged.
    """

    def __init__(self, period: int, model: nn.Module, data_loader: Any, num_iter: int) -> None:
        super().__init__(period, model, data_loader, num_iter)
        self.num_iter = num_iter

    def update_stats(self) -> None:
        """Estimate the statistics of all BN layers anew, over ``num_iter`` batches."""
        log.info("precise BN over %d batches", self.num_iter)
        super().update_stats()
        if comm.get_world_size() == 1:
            return
        for module in get_bn_modules(self.trainer.model):
            square = module.running_var + module.running_mean**2
            moments = torch.stack([module.running_mean, square])
            dist.all_reduce(moments)
            moments /= comm.get_world_size()
            module.running_mean = moments[0]
            module.running_var = moments[1] - moments[0] ** 2


def build_trainer(cfg: CfgNode, model: nn.Module, run: CfgNode) -> Trainer:
    """The trainer of a loaded model.

    Args:
        cfg: the config whose ``DATASETS`` are names in the catalog.
        model: from :func:`build_detector`, weights loaded, not wrapped.
        run: the config that is recorded, with the data sets as the user gave them.

    Raises:
        UserError: a layer or a BN would not be trained.
    """
    assert_all_trained(model, cfg.MODEL.BACKBONE.FREEZE_AT)
    optimizer = build_optimizer(cfg, model)
    on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
    device_ids = None if on_cpu else [comm.get_local_rank()]
    wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
    step_type = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
    trainer = Trainer(
        step_type(wrapped, build_detection_train_loader(cfg), optimizer),
        build_lr_scheduler(cfg, optimizer),
        model,
        cfg.SOLVER.MAX_ITER,
        cfg.OUTPUT_DIR,
    )
    trainer.register_hooks(_build_hooks(cfg, trainer, run))
    return trainer


def _build_hooks(cfg: CfgNode, trainer: Trainer, run: CfgNode) -> Sequence[HookBase | None]:
    """In Detectron2's order: statistics, then checkpoint, then evaluation, then writers."""
    precise = None
    if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(trainer.model):
        alone = cfg.clone()
        alone.defrost()
        alone.DATALOADER.NUM_WORKERS = 0  # not a second set of workers for a few batches
        precise = PreciseBN(
            cfg.TEST.EVAL_PERIOD,
            trainer.model,
            build_detection_train_loader(alone),
            cfg.TEST.PRECISE_BN.NUM_ITER,
        )
    main = comm.is_main_process()
    proxy = weakref.proxy(trainer)

    def test() -> dict[str, Any]:
        done = min(proxy.iter + 1, proxy.max_iter)
        return evaluate(cfg, proxy.model, run=run, iteration=done)

    writers = (
        [
            ProgressPrinter(cfg.SOLVER.MAX_ITER),
            JSONWriter(str(Path(cfg.OUTPUT_DIR, "metrics.json"))),
            TensorboardXWriter(cfg.OUTPUT_DIR),
        ]
        if main
        else []
    )
    return [
        hooks.IterationTimer(),
        hooks.LRScheduler(),
        precise,
        hooks.PeriodicCheckpointer(trainer.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
        if main
        else None,
        hooks.EvalHook(cfg.TEST.EVAL_PERIOD, test) if cfg.DATASETS.TEST else None,
        hooks.PeriodicWriter(writers, period=cfg.LOG_PERIOD) if main else None,
    ]


def evaluate(
    cfg: CfgNode, model: nn.Module, *, run: CfgNode | None = None, iteration: int | None = None
) -> dict[str, Any]:
    """Evaluate on the test set and write ``results.json``.

    Args:
        cfg: a config whose ``DATASETS.TEST`` is the name of one registered data set.
        model: the detector; all ranks call this together, each sees its share of the images.
        run: the config to record (``cfg`` by default).
        iteration: how long the model was trained, for the record.

    Returns:
        ``{"bbox": {"AP": ..., "AP50": ..., "AP75": ..., "per_class": {...}}, "segm": {...}}`` on
        the first rank, AP in percent; an empty dict on the others.
    """
    (name,) = cfg.DATASETS.TEST
    metadata = MetadataCatalog.get(name)
    masks = cfg.MODEL.MASK_ON and metadata.get("has_masks", metadata.evaluator_type == "coco")
    evaluator = build_evaluator(
        name,
        tasks=("bbox", "segm") if masks else ("bbox",),
        output_dir=str(Path(cfg.OUTPUT_DIR, "inference")),
    )
    loader = build_detection_test_loader(cfg, name)
    ticker = Ticker("evaluating", len(loader))
    with printing_to_log():  # pycocotools prints its tables
        results = inference_on_dataset(model, loader, evaluator, {"after_inference": ticker.tick})
    if not comm.is_main_process():
        return {}
    results = {task: _with_classes_apart(scores) for task, scores in results.items()}
    for task, scores in results.items():
        line = "  ".join(f"{k} {scores[k]:.2f}" for k in ("AP", "AP50", "AP75") if k in scores)
        log.info("%-10s %s", task, line)
    write_results(run or cfg, results, metadata.get("spec", name), iteration)
    return results


def _with_classes_apart(scores: dict[str, float]) -> dict[str, Any]:
    """``{"AP": 40, "AP-cat": 50}`` -> ``{"AP": 40, "per_class": {"cat": 50}}``."""
    overall: dict[str, Any] = {k: v for k, v in scores.items() if not k.startswith("AP-")}
    overall["per_class"] = {k[3:]: v for k, v in scores.items() if k.startswith("AP-")}
    return overall
