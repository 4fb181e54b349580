"""The processes of a run: start them, train, evaluate."""

import os
import re
import time
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from .detector import build_detector, load_weights
from .errors import UserError
from .files import replace_text
from .plan import Options, Plan, prepare, trials, under_torchrun, with_registered_data
from .progress import duration, log, logging_to
from .trainer import build_trainer, evaluate
from .weights import holds_detector, load_detector, read_detector


def train_net(options: Options) -> None:
    """Do what the command line says: one run, or ``trials`` of them with consecutive seeds.

    Raises:
        UserError: a mistake in the input, found before anything is written where that can be.
    """
    plan = prepare(options)
    for trial in trials(plan, options.trials):
        if under_torchrun():
            _join_process_group()
            run(trial)
            continue
        try:
            launch(run_in_process, options.num_gpus, dist_url="auto", args=(trial,))
        except torch.multiprocessing.ProcessRaisedException as error:
            mistake = re.search(r"moco_det\.errors\.UserError: (.*)", str(error))
            if mistake is None:
                raise
            raise UserError(mistake.group(1)) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def run_in_process(plan: Plan) -> None:
    """:func:`run` in a process that may be one of several.

    Raises:
        UserError: of that very type, whose message the parent finds in the traceback it is given.
    """
    try:
        run(plan)
    except UserError as error:
        raise UserError(str(error)) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(plan: Plan) -> None:
    """Train and evaluate one resolved run; every rank calls this together."""
    rank = comm.get_rank()
    output_dir = Path(plan.cfg.OUTPUT_DIR)
    with logging_to(output_dir, rank):
        for note in plan.notes:
            log.info(note)
        cfg = with_registered_data(plan.cfg, plan.eval_only)
        seed_all_rng((plan.cfg.SEED + rank + _resumed_iteration(output_dir) * plan.resume) % 2**31)
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        model = build_detector(cfg)
        if plan.eval_only:
            _evaluate_only(plan, cfg, model)
            return
        resuming = plan.resume and (output_dir / "last_checkpoint").is_file()
        if cfg.MODEL.WEIGHTS and not resuming:
            load_weights(model, cfg.MODEL.WEIGHTS)
        elif not resuming:
            log.info("loaded     nothing: random weights")
        trainer = build_trainer(cfg, model, plan.cfg)
        if resuming and trainer.resume():
            log.info("resumed    at iteration %d of %d", trainer.start_iter, trainer.max_iter)
        if rank == 0:
            replace_text(output_dir / "config.yaml", plan.cfg.dump())
        if trainer.start_iter >= trainer.max_iter:
            if cfg.DATASETS.TEST:
                evaluate(cfg, trainer.model, run=plan.cfg, iteration=trainer.max_iter)
            return
        start = time.perf_counter()
        try:
            trainer.fit()
        except FloatingPointError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{reason} Lower SOLVER.BASE_LR, or lengthen SOLVER.WARMUP_ITERS."
            ) from error
        log.info("done       %s in %s", output_dir, duration(time.perf_counter() - start))


def _evaluate_only(plan: Plan, cfg: CfgNode, model: torch.nn.Module) -> None:
    """Evaluate the weights that the user names, else the run's newest, else the config's."""
    path = cfg.MODEL.WEIGHTS
    last = Path(cfg.OUTPUT_DIR, "last_checkpoint")
    if last.is_file() and "MODEL.WEIGHTS" not in plan.explicit:
        path = str(last.parent / last.read_text().strip())
    if not path or not holds_detector(path):
        raise UserError(
            f"nothing to evaluate: there is no checkpoint in {cfg.OUTPUT_DIR}, and MODEL.WEIGHTS "
            f"({path or 'empty'}) is no detector."
        )
    checkpoint = read_detector(path)
    load_detector(model, checkpoint["model"], source=path)
    log.info("loaded     %s: the whole detector", path)
    iteration = checkpoint.get("iteration")
    evaluate(cfg, model, run=plan.cfg, iteration=None if iteration is None else iteration + 1)


def _resumed_iteration(directory: Path) -> int:
    """Iteration in the name of the newest checkpoint: a resumed run draws other images."""
    last = directory / "last_checkpoint"
    found = re.search(r"\d+", last.read_text()) if last.is_file() else None
    return int(found.group()) if found else 0


def _join_process_group() -> None:
    """The process group of ``torchrun``, whose environment names it."""
    if dist.is_initialized():
        return
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    comm.synchronize()
