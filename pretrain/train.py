"""The pre-training loop. It knows no method by name."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import yaml
from fvcore.common.config import CfgNode
from torch import nn

from pretrain import checkpoint, distributed
from pretrain.errors import UserError
from pretrain.loader import build_batches
from pretrain.methods import build_method
from pretrain.monitor import Monitor
from pretrain.optimizers import build_optimizer
from pretrain.progress import Progress
from pretrain.schedules import learning_rate
from pretrain.sources import open_source
from pretrain.step import TrainStep
from pretrain.version import __version__
from pretrain.views import recipe

# A resumed run must have these in common with the run that wrote the checkpoint.
FIXED = ("METHOD", "SEED", "MODEL", "MOCO", "INPUT", "SOLVER.BATCH_SIZE")


def train(cfg: CfgNode, resume: bool = False) -> None:
    """Run ``cfg`` on this rank to its end, writing ``cfg.OUTPUT_DIR``.

    Raises:
        UserError: bad data or configuration, a non-empty output directory without ``resume``, a
            checkpoint of another architecture, a loss that is not finite.
    """
    folder = Path(cfg.OUTPUT_DIR)
    world, main = distributed.world_size(), distributed.rank() == 0
    if cfg.SOLVER.BATCH_SIZE % world or 2 * world > cfg.SOLVER.BATCH_SIZE:
        raise UserError(
            f"SOLVER.BATCH_SIZE {cfg.SOLVER.BATCH_SIZE} cannot be shared by {world} ranks: "
            f"choose a multiple of {world}, at least {2 * world}."
        )
    source = open_source(cfg.DATA)
    total = math.ceil(cfg.SOLVER.EPOCHS * len(source) / cfg.SOLVER.BATCH_SIZE)
    if cfg.SOLVER.MAX_ITER > 0:
        total = min(total, cfg.SOLVER.MAX_ITER)

    torch.manual_seed(cfg.SEED)
    device = distributed.device()
    method = build_method(cfg, num_images=len(source), total_steps=total)
    method = method.to(device).to(memory_format=torch.channels_last)
    take_step = TrainStep(method, build_optimizer(cfg, method), total_steps=total)
    start = _restore(cfg, folder, method, take_step) if resume else 0
    if not resume and (folder / checkpoint.LAST).exists():
        raise UserError(
            f"{folder} already holds a run: add --resume to go on with it, or choose another "
            f"--output-dir."
        )
    distributed.barrier()  # nobody writes into the folder before everybody has looked at it
    progress = None
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(cfg.dump())
        progress = Progress(folder, start=start, total=total, batch_size=cfg.SOLVER.BATCH_SIZE)
        progress.say(_banner(cfg, len(source), total, world, device, start))
    views = recipe(
        cfg.INPUT.AUGMENTATION, crop_size=cfg.INPUT.CROP_SIZE, min_scale=cfg.INPUT.MIN_SCALE
    )
    batches = build_batches(
        source,
        [views, views],
        batch_size=cfg.SOLVER.BATCH_SIZE,
        rank=distributed.rank(),
        world_size=world,
        seed=cfg.SEED,
        start_step=start,
        stop_step=total,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=device.type == "cuda",
        max_bad_share=cfg.DATALOADER.MAX_BAD_SHARE,
    )
    monitor = None
    if method.chance_loss is not None:
        monitor = Monitor(
            method.chance_loss,
            patience=max(200, 2 * math.ceil(cfg.MOCO.QUEUE_SIZE / cfg.SOLVER.BATCH_SIZE)),
        )
    skipped = folder / "skipped_images.txt"
    method.train()
    step = start
    recent: list[torch.Tensor] = []
    for batch in batches:
        lr = learning_rate(
            step,
            total,
            base=cfg.SOLVER.BASE_LR,
            schedule=cfg.SOLVER.SCHEDULE,
            warmup=cfg.SOLVER.WARMUP_ITERS,
            milestones=cfg.SOLVER.MILESTONES,
            gamma=cfg.SOLVER.GAMMA,
        )
        views_here = [view.to(device, non_blocking=True) for view in batch.views]
        outputs = take_step(views_here, batch.index, step, lr)
        step += 1

        if batch.skipped:
            with skipped.open("a") as file:
                file.writelines(f"{name}\t{reason}\n" for name, reason in batch.skipped)
        names = list(outputs)
        recent.append(torch.stack([outputs[name].to(device) for name in names]))
        if step % cfg.LOG.PERIOD == 0 or step == total:
            means = torch.stack(recent).mean(0)
            distributed.all_reduce_mean([means])
            recent.clear()
            scalars = dict(zip(names, means.tolist(), strict=True))
            if not math.isfinite(scalars["loss"]):
                raise UserError(
                    f"The loss is {scalars['loss']} at iteration {step}: lower SOLVER.BASE_LR "
                    f"({lr:g} there) and go on with --resume from the last checkpoint."
                )
            if progress:
                scalars |= {"lr": lr, "epoch": step * cfg.SOLVER.BATCH_SIZE / len(source)}
                progress.log(step, _line(scalars, method.chance_loss), **scalars)
                warning = monitor and monitor.observe(
                    step, scalars["loss"], scalars["accuracy"], scalars["spread"]
                )
                if warning:
                    progress.say(f"warning: {warning}")
        if step % cfg.CHECKPOINT.PERIOD == 0 or step == total:
            _save(cfg, folder, method, take_step, step)
    if progress:
        if start >= total:
            progress.say(f"nothing left to do: {folder} is at iteration {start} of {total}")
        progress.say(f"pre-training done: {folder / checkpoint.LAST}")
        progress.close()


def _save(cfg: CfgNode, folder: Path, method: nn.Module, take_step: TrainStep, step: int) -> None:
    """All ranks: average the BN statistics (here and in what is saved), then rank 0 writes."""
    distributed.average_batch_norm(method)
    rng = distributed.all_gather(torch.get_rng_state()[None].to(distributed.device()))
    if distributed.rank() == 0:
        state = {
            "format": checkpoint.FORMAT,
            "version": __version__,
            "config": cfg.dump(),
            "step": step,
            "world_size": distributed.world_size(),
            "state_dict": method.state_dict(),
            **take_step.state_dict(),
            "rng": {"torch": [row.clone() for row in rng.cpu()]},
        }
        checkpoint.save(state, folder, keep=cfg.CHECKPOINT.KEEP)
    distributed.barrier()


def _restore(cfg: CfgNode, folder: Path, method: nn.Module, take_step: TrainStep) -> int:
    """Load the newest checkpoint of ``folder``; return the steps done, 0 where there is none."""
    path = folder / checkpoint.LAST
    if not path.exists():
        return 0
    state = checkpoint.load(path)
    old = yaml.safe_load(state["config"])
    differences = []
    for key in FIXED:
        before, now = old, yaml.safe_load(cfg.dump())
        for part in key.split("."):
            before, now = before.get(part), now[part]
        if before != now:
            differences.append(_difference(key, before, now))
    if differences:
        raise UserError(
            f"{path} was written by another configuration, and cannot be resumed: "
            f"{'; '.join(differences)}. Give the same configuration or another --output-dir."
        )
    method.load_state_dict(state["state_dict"])
    take_step.load_state_dict(state)
    if state["world_size"] == distributed.world_size():
        # A copy: torch reads the state as a struct, and crashes on a view that is not aligned.
        torch.set_rng_state(state["rng"]["torch"][distributed.rank()].clone())
    elif distributed.rank() == 0:
        print(
            f"note: {path} was written by {state['world_size']} ranks and goes on with "
            f"{distributed.world_size()}, from the same place in the data",
            flush=True,
        )
    return int(state["step"])


def _difference(key: str, before: object, now: object) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        return "; ".join(
            _difference(f"{key}.{name}", before.get(name), now.get(name))
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        )
    return f"{key} was {before!r} and is now {now!r}"


def _banner(
    cfg: CfgNode, images: int, total: int, world: int, device: torch.device, start: int
) -> str:
    ranks = "one process" if world == 1 else f"{world} ranks"
    return (
        f"{cfg.METHOD}: ResNet-{cfg.MODEL.DEPTH} width {cfg.MODEL.WIDTH:g}, {images} images, "
        f"batch {cfg.SOLVER.BATCH_SIZE} on {ranks} ({device.type}), {total} iterations"
        f" ({total * cfg.SOLVER.BATCH_SIZE / images:.1f} epochs), lr {cfg.SOLVER.BASE_LR:g}"
        + (f", resumed at iteration {start}" if start else "")
    )


def _line(scalars: dict[str, float], chance_loss: float | None) -> str:
    """What a method reports, in one order, each only where there is such a thing."""
    parts = [f"epoch {scalars['epoch']:.2f}", f"loss {scalars['loss']:.3f}"]
    if chance_loss is not None:
        parts[-1] += f" (chance {chance_loss:.3f})"
    if "accuracy" in scalars:
        parts.append(f"accuracy {scalars['accuracy']:6.1%}")
    parts.append(f"spread {scalars['spread']:.2f}")
    if "queue_fill" in scalars:
        parts.append(f"queue {scalars['queue_fill']:4.0%}")
    return "  ".join([*parts, f"lr {scalars['lr']:.4f}"])
