"""The smallest run of each method: its configuration, its views, some of its steps."""

import shutil
from pathlib import Path

import numpy as np
import torch

from moco_common import comm
from pretrain import distributed
from pretrain.checkpoint import format as checkpoint
from pretrain.config.defaults import get_defaults, load_config
from pretrain.engine.train_loop import train
from pretrain.engine.train_step import TrainStep
from pretrain.methods import METHODS, build_method
from pretrain.solver.optimizers import build_optimizer

BATCH, IMAGES, STEPS, CLASSES = 16, 40, 3, 5
DENSE = ("dense-cl", "pixpro", "slot-con")  # methods that need feature maps of several cells


# Scalars that are means over the batch.
AVERAGED = ("loss", "accuracy", "dense_accuracy", "overlap", "slots", "top1")


def config(method, *overrides):
    """A ResNet-18 a sixteenth as wide; every part of the method at work within three steps."""
    cfg = get_defaults()
    cfg.METHOD = method
    cfg.MODEL.DEPTH, cfg.MODEL.WIDTH, cfg.MODEL.BN_GROUPS = 18, 1 / 16, 1
    cfg.MOCO.DIM, cfg.MOCO.TEMPERATURE, cfg.MOCO.QUEUE_SIZE = 8, 0.2, 21
    cfg.BANK.NEGATIVES = 20
    cfg.SLOTCON.HIDDEN, cfg.SLOTCON.DIM, cfg.SLOTCON.SLOTS = 16, 8, 6
    cfg.SIMCLR.DIM, cfg.SUPERVISED.CLASSES = 8, CLASSES
    cfg.PIXPRO.HIDDEN, cfg.PIXPRO.DIM, cfg.PIXPRO.INSTANCE_WEIGHT = 16, 8, 0.5
    cfg.BYOL.HIDDEN, cfg.BYOL.DIM, cfg.BYOL.MOMENTUM = 16, 8, 0.9
    cfg.SWAV.HIDDEN, cfg.SWAV.DIM, cfg.SWAV.PROTOTYPES = 16, 8, 12
    cfg.SWAV.FREEZE_ITERS, cfg.SWAV.QUEUE_SIZE = 1, 21
    cfg.SOLVER.BATCH_SIZE, cfg.SOLVER.BASE_LR = BATCH, 0.05
    cfg.merge_from_list(list(overrides))
    return cfg


def views(method, step):
    """Views of a global batch, normalised floats (the encoder takes both); small ones for SwAV."""
    generator = torch.Generator().manual_seed(100 + step)
    sizes = {"swav": (32, 32, 16, 16)}.get(method, (64, 64) if method in DENSE else (32, 32))
    return [
        torch.randn(BATCH, 3, size, size, generator=generator, dtype=torch.float64)
        for size in sizes
    ]


def places(method, step):
    """Where each of these views lies in its image, some of them flipped."""
    generator = torch.Generator().manual_seed(200 + step)
    corner, extent, flip = torch.rand(
        3, len(views(method, step)), BATCH, 2, generator=generator, dtype=torch.float64
    )
    top_left = 0.3 * corner
    return torch.cat([top_left, top_left + 0.4 + 0.3 * extent, flip[..., :1].round()], 2)


def index(step):
    """Which image each row shows: some again in the next step, one twice in a step."""
    result = torch.arange(step * 10, step * 10 + BATCH) % IMAGES
    result[3] = result[12]
    return result


def build(method, *overrides):
    torch.manual_seed(3)
    cfg = config(method, *overrides)
    labels = np.arange(IMAGES, dtype=np.int32) % CLASSES
    built = build_method(cfg, num_images=IMAGES, total_steps=STEPS, labels=labels).double()
    return built.train(), cfg


def steps(method, *overrides):
    """`STEPS` steps on this rank's share; what must not depend on the number of ranks."""
    built, cfg = build(method, *overrides)
    take = TrainStep(built, build_optimizer(cfg, built), total_steps=STEPS)
    share = BATCH // comm.world_size()
    mine = slice(comm.rank() * share, (comm.rank() + 1) * share)
    scalars = []
    for step in range(STEPS):
        rows = [view[mine] for view in views(method, step)]
        where = places(method, step)[:, mine]
        outputs = take(rows, index(step)[mine], step, cfg.SOLVER.BASE_LR, where)
        scalars += [outputs[name].double() for name in sorted(outputs) if name in AVERAGED]
    distributed.all_reduce_mean(scalars)
    distributed.average_batch_norm(built)
    built.before_save()
    return {
        "scalars": torch.stack(scalars),
        "gradients": {n: p.grad for n, p in built.named_parameters() if p.grad is not None},
        "state": built.state_dict() if comm.rank() == 0 else {},
    }


def settings(world):
    """Method and overrides: BN over the share of each rank, or over all ranks."""
    apart, together = ("MODEL.BN_GROUPS", world), ("MODEL.SYNC_BN", True)
    if world == 4:
        return [("memory-bank", *apart), ("swav", *together)]
    nce = ("memory-bank", "BANK.LOSS", "nce", *apart)
    synchronised = [
        (method, *together) for method in ("simclr", "byol", "swav", "pixpro", "slot-con")
    ]
    return [*((method, *apart) for method in METHODS if method != "moco"), nce, *synchronised]


def steps_of_all(world):
    """The steps of all `settings`, in one start of the ranks."""
    return [steps(*words) for words in settings(world)]


def recipe(method, photographs, out, *overrides):
    """The method's own recipe, made tiny: six steps, a checkpoint after three."""
    small = (
        "MODEL.DEPTH 18 MODEL.WIDTH 0.0625 MODEL.BN_GROUPS 2 INPUT.CROP_SIZE 32 "
        "INPUT.SMALL_CROP_SIZE 16 MOCO.DIM 8 BANK.NEGATIVES 5 BYOL.HIDDEN 16 BYOL.DIM 8 "
        "SWAV.HIDDEN 16 SWAV.DIM 8 SWAV.PROTOTYPES 12 SWAV.FREEZE_ITERS 2 SWAV.QUEUE_SIZE 20 "
        "MOCO.QUEUE_SIZE 20 PIXPRO.HIDDEN 16 PIXPRO.DIM 8 "
        "SLOTCON.HIDDEN 16 SLOTCON.DIM 8 SLOTCON.SLOTS 6 "
        "SOLVER.WARMUP_ITERS 2 SOLVER.BATCH_SIZE 8 SOLVER.BASE_LR 0.2 SOLVER.MAX_ITER 6 "
        "CHECKPOINT.PERIOD 3 CHECKPOINT.KEEP 9 LOG.PERIOD 1 DATALOADER.NUM_WORKERS 0"
    )
    crop = ["INPUT.CROP_SIZE", "64"] if method in DENSE else []
    cfg = load_config(method, [*small.split(), *crop, *overrides])
    cfg.DATA, cfg.OUTPUT_DIR = [str(photographs)], str(out)
    return cfg


def whole_and_resumed(methods, photographs, folder):
    """Each method's `recipe` from start to end, and again from the checkpoint after three steps."""
    for method in methods:
        whole, broken = Path(folder, method, "whole"), Path(folder, method, "broken")
        train(recipe(method, photographs, whole), quiet=True)
        if comm.rank() == 0:
            broken.mkdir()
            for name in ("checkpoint_00000003.pth", checkpoint.LAST):
                shutil.copy(whole / "checkpoint_00000003.pth", broken / name)
        comm.barrier()
        train(recipe(method, photographs, broken), resume=True, quiet=True)
    return True
