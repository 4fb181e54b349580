"""A run from its plan: start the processes, train, evaluate."""

import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from moco_common import comm as ranks
from moco_common.errors import UserError
from moco_common.files import full_disk_left_to_caller, remove_unfinished, replace_text
from moco_common.launch import launch, under_torchrun
from moco_common.run_lock import RunLock
from moco_common.text import duration
from moco_det.checkpoint.detector_weights import (
    holds_detector,
    load_detector,
    load_weights,
    read_detector,
)
from moco_det.checkpoint.run_checkpointer import newest_checkpoints
from moco_det.data.build import with_registered_data
from moco_det.data.register import write_findings
from moco_det.data.samplers import TrainingSet, load_training_set
from moco_det.engine.console_log import log, logging_to
from moco_det.engine.memory_preflight import preflight
from moco_det.engine.setup import Options, Plan, prepare, trials
from moco_det.engine.trainer import build_trainer, evaluate
from moco_det.modeling.detector import build_detector

FINDINGS = "findings.json"  # everything that was wrong in own data, with file and object
PREFLIGHTS = ("auto", "always", "only", "never")


def train_net(options: Options) -> None:
    """Do what the command line says: one run, or ``trials`` of them with consecutive seeds.

    Raises:
        UserError: a mistake in the input, found before anything is written where that can be.
        Stopped: a signal ended the run; its state is saved.
    """
    plan = prepare(options)
    launch(_run_trials, options.num_gpus, plan, options.trials)


def _run_trials(plan: Plan, count: int | None) -> None:
    """Do this rank's part of the runs; all ranks resume if one was restarted."""
    if ranks.world_size() > 1:
        local = int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else ranks.world_size()
        comm.create_local_process_group(local)
    plan = replace(plan, resume=bool(ranks.maximum(int(plan.resume))))
    for trial in trials(plan, count):
        run(trial)


def run(plan: Plan) -> None:
    """Train and evaluate one resolved run; every rank calls this together."""
    rank = comm.get_rank()
    output_dir = Path(plan.cfg.OUTPUT_DIR)
    writes = rank == 0 and not plan.eval_only
    with (
        RunLock(output_dir, held=writes),
        logging_to(output_dir, rank, plan.quiet),
        full_disk_left_to_caller(),
    ):
        if writes:
            for folder in (output_dir, output_dir / "inference"):
                remove_unfinished(folder)
        for note in plan.notes:
            log.info(note)
        cfg = with_registered_data(plan.cfg, plan.eval_only)
        if writes:
            write_findings([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], output_dir / FINDINGS)
        seed_all_rng(plan.cfg.SEED % 2**31)  # the same weights on all ranks
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        model = build_detector(cfg)
        if plan.eval_only:
            _evaluate_only(plan, cfg, model)
        else:
            _train(plan, cfg, model)


def _train(plan: Plan, cfg: CfgNode, model: torch.nn.Module) -> None:
    output_dir = Path(cfg.OUTPUT_DIR)
    resuming = plan.resume and bool(newest_checkpoints(output_dir))
    if cfg.MODEL.WEIGHTS and not resuming:
        load_weights(model, cfg.MODEL.WEIGHTS)
    elif not resuming:
        log.info("loaded     nothing: random weights")
    training_set = load_training_set(cfg)
    if not _fits(cfg, model, training_set):
        return
    trainer = build_trainer(cfg, model, plan.cfg, training_set=training_set, resume=resuming)
    if comm.is_main_process():
        replace_text(output_dir / "config.yaml", plan.cfg.dump())
    if trainer.start_iter >= trainer.max_iter:
        if cfg.DATASETS.TEST:
            evaluate(cfg, model, run=plan.cfg, iteration=trainer.max_iter)
        return
    start = time.perf_counter()
    trainer.fit()
    log.info("done       %s in %s", output_dir, duration(time.perf_counter() - start))


def _fits(cfg: CfgNode, model: torch.nn.Module, training_set: TrainingSet) -> bool:
    """Try the worst batch, where the config wants it; whether to go on.

    Raises:
        UserError: it does not fit.
    """
    when = cfg.PREFLIGHT
    if when not in PREFLIGHTS:
        raise UserError(f"PREFLIGHT {when!r} is unknown: there are {', '.join(PREFLIGHTS)}.")
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    if when == "never" or (when == "auto" and not on_gpu):
        return True
    report = preflight(cfg, model, training_set)
    if not report.fits:
        raise UserError(f"{report}.")
    log.info("memory     %s", report)
    return bool(when != "only")


def _evaluate_only(plan: Plan, cfg: CfgNode, model: torch.nn.Module) -> None:
    """Evaluate the weights that the user names, else the run's newest, else the config's."""
    path = cfg.MODEL.WEIGHTS
    newest = newest_checkpoints(cfg.OUTPUT_DIR)
    if newest and "MODEL.WEIGHTS" not in plan.explicit:
        path = str(newest[0])
    if not path or not holds_detector(path):
        raise UserError(
            f"nothing to evaluate: there is no checkpoint in {cfg.OUTPUT_DIR}, and MODEL.WEIGHTS "
            f"({path or 'empty'}) is no detector."
        )
    checkpoint = read_detector(path)
    load_detector(model, checkpoint["model"], source=path)
    log.info("loaded     %s: the whole detector", path)
    iteration = checkpoint.get("iteration")
    evaluate(
        cfg,
        model,
        run=plan.cfg,
        iteration=None if iteration is None else iteration + 1,
    )
