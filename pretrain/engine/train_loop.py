"""The pre-training loop. It knows no method by name."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from moco_common import comm
from moco_common.errors import UserError, lost_worker_explained
from moco_common.files import (
    check_exists,
    full_disk_left_to_caller,
    remove_unfinished,
    replace_text,
)
from moco_common.hardware import cpu_count
from moco_common.launch import launch
from moco_common.run_lock import PRETRAINING, RunLock, check_kind_of_run
from moco_common.stopping import Stopped, StopRequest
from moco_common.text import counted
from pretrain.checkpoint import consistency as guards
from pretrain.checkpoint import format as checkpoint
from pretrain.checkpoint.async_writer import Snapshots
from pretrain.checkpoint.initial_weights import read_initial_weights, start_from
from pretrain.config.defaults import run_config
from pretrain.data.loader import Batch, build_batches
from pretrain.data.source_base import Source
from pretrain.data.sources import open_source
from pretrain.data.transforms.recipes import build_recipes
from pretrain.engine.embedding_rank import RecentEmbeddings
from pretrain.engine.health_monitor import Monitor, patience
from pretrain.engine.metrics import Scalars, SkippedImages
from pretrain.engine.progress import Progress
from pretrain.engine.resume import (
    Restored,
    capture,
    check_commands,
    check_readable,
    recorded_values,
    restore,
    shared,
)
from pretrain.engine.train_step import TrainStep
from pretrain.methods import build_method, method_class
from pretrain.methods.automatic import AUTO, QUEUE_SIZE, queue_size, resolve
from pretrain.methods.base import Method
from pretrain.probe.online import build_online_knn
from pretrain.profiling import Profiler
from pretrain.solver.optimizers import build_optimizer
from pretrain.solver.schedules import learning_rate, total_steps, warmup_steps


def start(
    cfg: CfgNode,
    processes: int = 1,
    *,
    resume: bool = False,
    quiet: bool = False,
    profile: int = 0,
) -> None:
    """Run `train` on ``processes`` ranks, on the kind of device that ``MODEL.DEVICE`` names.

    Raises:
        UserError, Stopped: as `train`; the device is unknown or missing; too few GPUs.
    """
    kinds = {"auto": None, "cuda": True, "cpu": False}
    if cfg.MODEL.DEVICE not in kinds:
        raise UserError(f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}': choose {', '.join(kinds)}.")
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        raise UserError("MODEL.DEVICE is cuda, but torch sees no GPU here: set it to cpu.")
    on_gpu = kinds[cfg.MODEL.DEVICE]
    launch(train, processes, cfg, resume, quiet, profile, on_gpu=on_gpu)


def train(cfg: CfgNode, resume: bool = False, quiet: bool = False, profile: int = 0) -> None:
    """Run ``cfg`` on this rank to its end, writing ``cfg.OUTPUT_DIR``.

    Args:
        resume: resume from the newest intact checkpoint there; if one rank does, all ranks do.
        quiet: print nothing but warnings.
        profile: number of iterations to time and trace, see `Profiler`; 0 for none.

    Raises:
        UserError: bad data or configuration; an output directory that contains a run (without
            ``resume``) or in which one is running; a checkpoint of another configuration; a loss
            that is not finite; ranks whose states differ; a full disk.
        Stopped: a signal requested it; the last completed step is saved.
    """
    _check(cfg)
    folder, main = Path(cfg.OUTPUT_DIR), comm.rank() == 0
    check_kind_of_run(folder, PRETRAINING)
    resume = bool(comm.maximum(int(resume)))
    if resume:
        check_commands(cfg, folder)
    elif cfg.MODEL.WEIGHTS:
        check_exists(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS names a checkpoint to start from")
    source = open_source(cfg.DATA)
    asked = cfg
    recorded = recorded_values(folder) if resume else {}
    cfg = resolve(cfg, len(source), comm.world_size(), recorded)
    method_class(cfg.METHOD).complete(cfg, source)
    config = run_config(cfg).dump()
    check_readable(config)
    total = total_steps(
        len(source),
        batch_size=cfg.SOLVER.BATCH_SIZE,
        epochs=cfg.SOLVER.EPOCHS,
        max_iter=cfg.SOLVER.MAX_ITER,
    )
    warmup = warmup_steps(
        len(source),
        batch_size=cfg.SOLVER.BATCH_SIZE,
        iterations=cfg.SOLVER.WARMUP_ITERS,
        epochs=cfg.SOLVER.WARMUP_EPOCHS,
    )
    torch.manual_seed(cfg.SEED)
    device = comm.device()
    method = build_method(cfg, num_images=len(source), total_steps=total, labels=source.labels)
    method = method.to(device).to(memory_format=torch.channels_last)
    take_step = TrainStep(
        method,
        build_optimizer(cfg, method),
        total_steps=total,
        precision=cfg.SOLVER.PRECISION,
        compile=cfg.SOLVER.COMPILE,
    )
    with (
        StopRequest() as request,
        full_disk_left_to_caller(),
        RunLock(folder, held=main),
        Snapshots(folder, keep=cfg.CHECKPOINT.KEEP) as snapshots,
    ):
        if not resume and checkpoint.candidates(folder):
            raise UserError(
                f"{folder} already contains a run: pass --resume to continue it, or choose another "
                f"--output-dir."
            )
        images = len(source)
        knn = build_online_knn(cfg, num_images=images, total_steps=total)
        data = source.fingerprint() if main else {}
        restored = Restored(0, [])
        if resume:
            restored = restore(cfg, folder, method, take_step, images, data)
        start, notes, weights = restored
        remarks: list[str] = []
        if cfg.MODEL.WEIGHTS and not start:
            initial = read_initial_weights(cfg.MODEL.WEIGHTS)
            remarks = start_from(initial, method, take_head=cfg.MODEL.TAKE_HEAD)
            notes, weights = [*notes, *initial.notes], initial.record()
        scalars, skipped = Scalars(), SkippedImages(folder)
        comm.barrier()  # no rank writes to the folder before all have read it
        progress = monitor = None
        if main:
            remove_unfinished(folder)
            replace_text(folder / "config.yaml", config)
            progress = Progress(
                folder, start=start, total=total, batch_size=cfg.SOLVER.BATCH_SIZE, quiet=quiet
            )
            progress.say(_banner(cfg, images, total, device, start))
            if start:
                progress.say(f"data: {', '.join(cfg.DATA)}")
            if cpu_count() < cfg.DATALOADER.NUM_WORKERS:
                progress.say(
                    f"DATALOADER.NUM_WORKERS is {cfg.DATALOADER.NUM_WORKERS}, but there are only "
                    f"{counted(cpu_count(), 'core')}: {cpu_count()} are used"
                )
            for note in [*remarks, *source.notes]:
                progress.say(note)
            for note in [*notes, *_remarks(cfg, images, total)]:
                progress.warn(note)
            if method.settling_images == cfg.MOCO.QUEUE_SIZE:
                said, warned = _queue_remarks(asked.MOCO.QUEUE_SIZE, cfg.MOCO.QUEUE_SIZE, images)
                for text, write in ((said, progress.say), (warned, progress.warn)):
                    if text:
                        write(text)
            wait = patience(method.settling_images, cfg.SOLVER.BATCH_SIZE)
            monitor = Monitor(method.chance_loss, wait, method.remedies)

        # A compiled encoder would be compiled again for each number of embeddings kept.
        recent = None if cfg.SOLVER.COMPILE else RecentEmbeddings(method.encoder_q)
        method.train()
        say = progress.say if progress else print
        profiler = Profiler(folder, profile, say=say) if profile else None
        run_step = profiler.watch_step(take_step) if profiler else take_step
        step, stop, pause, found, saved = start, 0, 0.0, {}, start
        with (
            lost_worker_explained(),
            closing(_batches(cfg, source, method, start, total)) as batches,  # stops its workers
        ):
            for batch in request.waiting(profiler.watch_data(batches) if profiler else batches):
                lr = _learning_rate(cfg, step, total, warmup)
                outputs = run_step(batch.to(device), batch.index, step, lr, batch.places)
                scalars.add(outputs, skipped=len(batch.skipped))
                skipped.add(batch.skipped)
                step += 1
                if progress:
                    progress.advance()

                snapshots.check()
                stop = request.agreed()
                logs = step % cfg.LOG.PERIOD == 0 or step == total
                saves = step % cfg.CHECKPOINT.PERIOD == 0 or step == total or stop
                if knn and knn.due(step):
                    with progress.pause() if progress else nullcontext():
                        found = knn.evaluate(method)
                if (logs or saves) and scalars.settle(step, saved):
                    skipped.settle()
                if logs:
                    means = scalars.take() | found
                    found = {}
                    means |= {"lr": lr, "epoch": step * cfg.SOLVER.BATCH_SIZE / images}
                    means |= {"skipped_images": skipped.count, "checkpoint_pause": pause}
                    if method.chance_loss is not None:
                        means["chance_loss"] = method.chance_loss
                    pause = 0.0
                    if progress:
                        rank = recent.rank() if recent else None
                        if rank is not None:
                            means["rank_me"] = rank
                        progress.log(step, _line(means, method.chance_loss), **means)
                        warning = monitor and monitor.observe(
                            step, means["loss"], means["spread"], means.get("accuracy", 0.0), rank
                        )
                        if warning:
                            progress.warn(warning)
                if saves or step == start + 1:
                    began = time.perf_counter()
                    state = capture(
                        method,
                        take_step,
                        config=config,
                        step=step,
                        images=images,
                        data=data,
                        weights=weights,
                    )
                    if main and step == start + 1:
                        snapshots.reserve(state)
                    if saves:
                        guards.check_finite(state["state_dict"], step, saved)
                        guards.check_same_on_all_ranks(shared(state), step, saved)
                        if main:
                            snapshots.take(state)
                        saved = step
                        pause += time.perf_counter() - began
                if progress and step == start + 1:
                    progress.begin(step)
                if stop:
                    break
        request.finish()
        snapshots.finish()
        comm.barrier()  # a rank that exits while rank 0 is writing would count as lost
        if progress:
            if start >= total:
                progress.say(f"nothing left to do: {folder} is at iteration {start} of {total}")
            if step < total:
                progress.warn(
                    f"stopped by {signal.Signals(stop).name} after iteration {step} of {total}, "
                    f"which is saved: pass --resume to continue"
                )
            else:
                progress.say(f"pre-training done: {folder / checkpoint.LAST}")
            progress.close()
    if step < total:
        raise Stopped(stop)


def _check(cfg: CfgNode) -> None:
    world, batch_size = comm.world_size(), cfg.SOLVER.BATCH_SIZE
    if batch_size % world or 2 * world > batch_size:
        raise UserError(
            f"SOLVER.BATCH_SIZE {batch_size} cannot be shared by {world} ranks: "
            f"choose a multiple of {world}, at least {2 * world}."
        )
    for key in ("LOG.PERIOD", "CHECKPOINT.PERIOD", "CHECKPOINT.KEEP"):
        section, name = key.split(".")
        if cfg[section][name] < 1:
            raise UserError(f"{key} is {cfg[section][name]}: it must be at least 1.")
    _learning_rate(cfg, step=0, total=1, warmup=0)  # a wrong schedule shows only after the warm-up


def _remarks(cfg: CfgNode, images: int, total: int) -> list[str]:
    """Return what a user might not expect of a run of ``total`` steps over so many images."""
    remarks = []
    if total < cfg.SOLVER.MAX_ITER:
        remarks.append(
            f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}, but SOLVER.EPOCHS {cfg.SOLVER.EPOCHS:g} "
            f"ends the run after {counted(total, 'iteration')}: set SOLVER.EPOCHS 0 for a run of "
            f"{cfg.SOLVER.MAX_ITER}"
        )
    if images < cfg.SOLVER.BATCH_SIZE:
        remarks.append(
            f"the data have {counted(images, 'image')}, fewer than a batch of "
            f"{cfg.SOLVER.BATCH_SIZE}: an image occurs several times in a batch, as its own "
            f"negative; use more images or a lower SOLVER.BATCH_SIZE"
        )
    return remarks


def _queue_remarks(asked: int | str, size: int, images: int) -> tuple[str, str]:
    """Return a note on a queue that was shortened for the data, and a warning of one too long."""
    if asked == AUTO and size < QUEUE_SIZE:
        return (
            f"MOCO.QUEUE_SIZE auto is {size} for {counted(images, 'image')}: the {QUEUE_SIZE} keys "
            f"of the papers would contain each image's own old keys"
        ), ""
    if asked != AUTO and 2 * size > images:
        return "", (
            f"MOCO.QUEUE_SIZE is {size}, more than half of the {counted(images, 'image')}: an "
            f"image's own old keys are then among its negatives; set it to "
            f"{queue_size(images)} or auto, or use more images"
        )
    return "", ""


def _batches(
    cfg: CfgNode, source: Source, method: Method, start: int, total: int
) -> Generator[Batch, None, None]:
    recipes = build_recipes(cfg)
    return build_batches(
        source,
        recipes[: method.num_views],
        batch_size=cfg.SOLVER.BATCH_SIZE,
        rank=comm.rank(),
        world_size=comm.world_size(),
        seed=cfg.SEED,
        start_step=start,
        stop_step=total,
        num_workers=min(cfg.DATALOADER.NUM_WORKERS, cpu_count()),
        pin_memory=comm.device().type == "cuda",
        max_bad_share=cfg.DATALOADER.MAX_BAD_SHARE,
    )


def _learning_rate(cfg: CfgNode, step: int, total: int, warmup: int) -> float:
    return learning_rate(
        step,
        total,
        base=cfg.SOLVER.BASE_LR,
        schedule=cfg.SOLVER.SCHEDULE,
        warmup=warmup,
        milestones=cfg.SOLVER.MILESTONES,
        gamma=cfg.SOLVER.GAMMA,
        decay_period=cfg.SOLVER.DECAY_PERIOD,
        end=cfg.SOLVER.END_SHARE,
    )


def _banner(cfg: CfgNode, images: int, total: int, device: torch.device, start: int) -> str:
    world = comm.world_size()
    ranks = "one process" if world == 1 else f"{world} ranks"
    return (
        f"{cfg.METHOD}: ResNet-{cfg.MODEL.DEPTH} width {cfg.MODEL.WIDTH:g}, "
        f"{counted(images, 'image')}, batch {cfg.SOLVER.BATCH_SIZE} on {ranks} ({device.type}), "
        f"{counted(total, 'iteration')} ({total * cfg.SOLVER.BATCH_SIZE / images:.1f} epochs), "
        f"lr {cfg.SOLVER.BASE_LR:g}" + (f", resumed at iteration {start}" if start else "")
    )


def _line(scalars: dict[str, float], chance_loss: float | None) -> str:
    """Format the scalars of a progress line, in a fixed order; not every method has them all."""
    parts = [f"epoch {scalars['epoch']:.2f}", f"loss {scalars['loss']:.3f}"]
    if chance_loss is not None:
        parts[-1] += f" (chance {chance_loss:.3f})"
    if "accuracy" in scalars:
        parts.append(f"accuracy {scalars['accuracy']:6.1%}")
    if "top1" in scalars:
        parts.append(f"top-1 {scalars['top1']:6.1%}")
    parts.append(f"spread {scalars['spread']:.2f}")
    if "rank_me" in scalars:
        parts.append(f"rank {scalars['rank_me']:.1f}")
    if "queue_fill" in scalars:
        parts.append(f"queue {scalars['queue_fill']:4.0%}")
    if "knn_top1" in scalars:
        parts.append(f"kNN {scalars['knn_top1']:.1f}%")
    parts.append(f"lr {scalars['lr']:.4f}")
    if scalars["skipped_images"]:
        parts.append(f"skipped {counted(int(scalars['skipped_images']), 'image')}")
    if scalars["checkpoint_pause"]:
        parts.append(f"checkpoint paused {scalars['checkpoint_pause']:.2f} s")
    return "  ".join(parts)
