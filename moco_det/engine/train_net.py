"""Fine-tuning from the command line: resolve the run, start its processes, train, evaluate."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from moco_common import comm as ranks
from moco_common.errors import UserError
from moco_common.files import full_disk_left_to_caller, remove_unfinished, replace_text
from moco_common.launch import check_processes, launch, restarted, under_torchrun
from moco_common.run_lock import RunLock
from moco_common.text import duration
from moco_det.checkpoint.detector_weights import (
    holds_detector,
    load_detector,
    load_weights,
    read_detector,
)
from moco_det.checkpoint.run_checkpointer import newest_checkpoints
from moco_det.data.catalog import SharedData, add_entries, own_entries
from moco_det.data.register import write_findings
from moco_det.data.samplers import TrainingSet, load_training_set
from moco_det.engine.console_log import log, logging_to
from moco_det.engine.memory_preflight import preflight
from moco_det.engine.setup import Options, Plan, prepare, trials, uses_gpus
from moco_det.engine.trainer import build_trainer, evaluate
from moco_det.modeling.detector import build_detector

FINDINGS = "findings.json"  # every fault of the user's data, with file and object
PREFLIGHTS = ("auto", "always", "only", "never")


def train_net(options: Options) -> None:
    """Train and evaluate once, or ``trials`` times with consecutive seeds.

    Raises:
        UserError: the input is wrong; nothing is written if this is found before training.
        Stopped: a signal ended the run; its state is saved.
    """
    on_gpu = uses_gpus(options)
    if under_torchrun():
        check_processes(options.num_gpus, on_gpu)
        launch(_settle_and_run, options.num_gpus, options, on_gpu=on_gpu)
        return
    plan = prepare(options)
    data = SharedData(_data_sets(plan.cfg)) if options.num_gpus > 1 else None
    launch(_run_trials, options.num_gpus, plan, options.trials, data, on_gpu=on_gpu)


def _data_sets(cfg: CfgNode) -> tuple[str, ...]:
    return (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)


def _run_trials(plan: Plan, count: int | None, data: SharedData | None) -> None:
    """Train and evaluate the runs on this rank."""
    if ranks.world_size() > 1:
        comm.create_local_process_group(ranks.world_size())
    if data is not None:
        data.register()
    for trial in trials(plan, count):
        run(trial)


def _settle_and_run(options: Options) -> None:
    """Resolve the runs and read their data on torchrun's rank 0, then run on all ranks.

    The data are broadcast, so hosts need not share a folder. All ranks resume if any was restarted.
    """
    if ranks.world_size() > 1:
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    resume = bool(ranks.maximum(int(options.resume or restarted())))
    settled: list[Any] = [None, None, None]
    if comm.is_main_process():
        try:
            plan = replace(prepare(options), resume=resume)
            settled = [trials(plan, options.trials), own_entries(_data_sets(plan.cfg)), None]
        except UserError as error:
            settled[2] = error
    comm.all_gather(None)  # wait for the reading without occupying a GPU
    if ranks.world_size() > 1:
        dist.broadcast_object_list(settled)
    plans, data, refused = settled
    if refused is not None:
        raise refused
    if not comm.is_main_process():
        add_entries(data)
    for plan in plans:
        run(plan)


def run(plan: Plan) -> None:
    """Train and evaluate one resolved run, whose data are registered; all ranks must call this."""
    cfg = plan.cfg
    rank = comm.get_rank()
    output_dir = Path(cfg.OUTPUT_DIR)
    writes = rank == 0 and not plan.eval_only
    with (
        RunLock(output_dir, held=writes),
        logging_to(output_dir, rank, plan.quiet),
        full_disk_left_to_caller(),
    ):
        if writes:
            for folder in (output_dir, *output_dir.glob("inference*")):
                remove_unfinished(folder)
        for note in plan.notes:
            log.info(note)
        if writes:
            write_findings(_data_sets(cfg), output_dir / FINDINGS)
        seed_all_rng(cfg.SEED % 2**31)  # the same weights on all ranks
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        model = build_detector(cfg)
        if plan.eval_only:
            _evaluate_only(plan, model)
        else:
            _train(plan, model)


def _train(plan: Plan, model: torch.nn.Module) -> None:
    cfg = plan.cfg
    output_dir = Path(cfg.OUTPUT_DIR)
    resuming = plan.resume and bool(newest_checkpoints(output_dir))
    if cfg.MODEL.WEIGHTS and not resuming:
        load_weights(model, cfg.MODEL.WEIGHTS)
    elif not resuming:
        log.info("loaded     nothing: random weights")
    training_set = load_training_set(cfg)
    if not _fits(cfg, model, training_set):
        return
    trainer = build_trainer(cfg, model, training_set=training_set, resume=resuming)
    if comm.is_main_process():
        replace_text(output_dir / "config.yaml", cfg.dump())
    if trainer.finished:
        if cfg.DATASETS.TEST:
            evaluate(
                cfg,
                model,
                iteration=min(trainer.start_iter, trainer.max_iter),
                average=trainer.average and trainer.average.module,
                selection=trainer.selection,
            )
        return
    start = time.perf_counter()
    trainer.fit()
    log.info("done       %s in %s", output_dir, duration(time.perf_counter() - start))


def _fits(cfg: CfgNode, model: torch.nn.Module, training_set: TrainingSet) -> bool:
    """Run the memory preflight if the config asks for it; return whether to train.

    Raises:
        UserError: the batch does not fit.
    """
    when = cfg.PREFLIGHT
    if when not in PREFLIGHTS:
        raise UserError(f"PREFLIGHT {when!r} is unknown: choose one of {', '.join(PREFLIGHTS)}.")
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    if when == "never" or (when == "auto" and not on_gpu):
        return True
    report = preflight(cfg, model, training_set)
    if not report.fits:
        raise UserError(f"{report}.")
    log.info("memory     %s", report)
    return bool(when != "only")


def _evaluate_only(plan: Plan, model: torch.nn.Module) -> None:
    """Evaluate the weights of the command line, else the newest checkpoint, else the config's."""
    cfg = plan.cfg
    path = cfg.MODEL.WEIGHTS
    newest = newest_checkpoints(cfg.OUTPUT_DIR)
    if newest and "MODEL.WEIGHTS" not in plan.explicit:
        path = str(newest[0])
    if not path or not holds_detector(path):
        raise UserError(
            f"nothing to evaluate: there is no checkpoint in {cfg.OUTPUT_DIR}, and MODEL.WEIGHTS "
            f"({path or 'empty'}) is not a detector: train first, or set MODEL.WEIGHTS."
        )
    checkpoint = read_detector(path)
    load_detector(model, checkpoint["model"], source=path)
    log.info("loaded     %s: the whole detector", path)
    iteration = checkpoint.get("iteration")
    evaluate(cfg, model, iteration=None if iteration is None else iteration + 1)
