"""One optimisation step of one or several forward and backward passes."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from moco_common.errors import UserError
from moco_det.data.samplers import TRAINING, Batch, seed_model

Watch = Callable[[Iterator[tuple[int, Batch]]], Iterator[tuple[int, Batch]]]


class TrainStep:
    """An optimizer step on the mean gradient of ``passes`` micro-batches.

    ``passes`` micro-batches on one process give the gradient of that many processes with one each,
    which is the published setting (16 images on 8 GPUs, 2 per pass), except that synchronised BN
    sees the images of one pass only. The gradient also equals that of a single pass over the joined
    batch where a loss is a mean over images (the RPN's, and the box head's if every image yields
    the same number of regions). A loss that is a mean over matches (masks of foreground regions,
    visible keypoints) weights all micro-batches equally, as DDP weights processes.

    Args:
        model: model in training mode that maps a batch to a dict of losses, possibly in DDP.
        batches: function of ``(first, last)`` that iterates over the micro-batches of iterations
            [first, last) as ``(number, batch)``, ``passes`` per iteration.
        optimizer: optimizer, stepped once for all passes.
        passes: number of micro-batches per step.
        seed: with the number of a micro-batch, it determines the random numbers of the model.
        dtype: dtype of autocast, None to disable it; with float16 (GPU only) the loss is scaled.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[int, int], Iterator[tuple[int, Batch]]],
        optimizer: torch.optim.Optimizer,
        *,
        passes: int = 1,
        seed: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.start_batches = batches
        self.loader: Iterator[tuple[int, Batch]] = iter(())
        self.batches = self.loader
        self.optimizer = optimizer
        self.passes = passes
        self.seed = seed
        self.device = next(model.parameters()).device
        self.dtype = dtype
        self.scaler = _scaler() if dtype is torch.float16 else None

    def start(self, first: int, last: int, watch: Watch = iter) -> None:
        """Start the loader at iteration ``first``.

        Args:
            watch: yields the batches of the loader, and obeys a signal while it waits for one.
        """
        self.loader = self.start_batches(first, last)
        self.batches = watch(self.loader)

    def __call__(self, iteration: int) -> dict[str, float]:
        """Take the step of an iteration (zero-based).

        Returns:
            The losses and their sum ``total_loss``, averaged over passes and processes, and
            ``data_time``, the seconds that the slowest process waited for data.

        Raises:
            UserError: a loss is not finite on any process; raised on all of them. Weights and
                optimizer are unchanged.
        """
        self.optimizer.zero_grad()
        rows: list[dict[str, Tensor]] = []
        files: list[list[str]] = []
        waited = 0.0
        for index in range(self.passes):
            start = time.perf_counter()
            number, batch = next(self.batches)
            waited += time.perf_counter() - start
            files.append([str(image.get("file_name", "?")) for image in batch])
            seed_model(self.seed, TRAINING, number)
            with _failure_explained(iteration, files[-1]):
                rows.append(self._pass(batch, last=index == self.passes - 1))
        losses = self._mean_losses(rows, files, iteration)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.unscale_(self.optimizer)  # so that clipping sees the true gradients
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return {**losses, "data_time": max(comm.all_gather(waited))}

    def _pass(self, batch: Batch, last: bool) -> dict[str, Tensor]:
        """Run one micro-batch; DDP averages the gradients in the last one."""
        scale = self.scaler.scale if self.scaler is not None else _unscaled
        ddp = isinstance(self.model, nn.parallel.DistributedDataParallel)
        with self.model.no_sync() if ddp and not last else nullcontext():  # type: ignore[operator]
            return forward_backward(
                self.model, batch, self.dtype, lambda loss: scale(loss / self.passes)
            )

    def _mean_losses(
        self, rows: list[dict[str, Tensor]], files: list[list[str]], iteration: int
    ) -> dict[str, float]:
        table = torch.stack([torch.stack(list(row.values())) for row in rows])  # passes x losses
        mean = table.mean(0)
        if comm.get_world_size() > 1:
            dist.all_reduce(mean)  # a loss that is not finite becomes so on all processes
            mean /= comm.get_world_size()
        losses = dict(zip(rows[0], mean.tolist(), strict=True))
        if not all(map(math.isfinite, losses.values())):
            finite = torch.isfinite(table).all(1).tolist()
            here = [
                name for ok, names in zip(finite, files, strict=True) for name in names if not ok
            ]
            found = ", ".join(name for names in comm.all_gather(here) for name in names)
            wrong = ", ".join(f"{k} {v}" for k, v in losses.items() if not math.isfinite(v))
            raise _diverged(f"the loss is not finite in iteration {iteration + 1} ({wrong})", found)
        return {"total_loss": sum(losses.values()), **losses}

    def close(self) -> None:
        """Stop the loader and its workers."""
        if isinstance(self.loader, Generator):
            self.loader.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer and, with float16, of the loss scaler."""
        state = {"optimizer": self.optimizer.state_dict()}
        return state if self.scaler is None else state | {"grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; a scaler without a saved state starts afresh."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None and "grad_scaler" in state:
            self.scaler.load_state_dict(state["grad_scaler"])


@contextmanager
def _failure_explained(iteration: int, names: list[str]) -> Iterator[None]:
    """Turn what a model raises when training diverges, or the GPU is full, into a `UserError`."""
    images = ", ".join(names)
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            f"iteration {iteration + 1} needs more memory than the GPU has, on the images "
            f"{images}: raise SOLVER.ACCUMULATION_STEPS or set SOLVER.AMP.ENABLED True, and pass "
            "--resume if there is a checkpoint; --preflight measures what is needed."
        ) from None
    except (FloatingPointError, AssertionError) as error:  # Detectron2's checks of its boxes
        if isinstance(error, AssertionError) and "infinite or NaN" not in str(error):
            raise
        what = f"the model's output is not finite in iteration {iteration + 1}"
        raise _diverged(what, images) from None


def _diverged(what: str, images: str) -> UserError:
    return UserError(
        f"{what}, on the images {images}; nothing was saved since the last checkpoint: lower "
        "SOLVER.BASE_LR or raise SOLVER.WARMUP_ITERS, and pass --resume if there is a checkpoint."
    )


def forward_backward(
    model: nn.Module,
    batch: Batch,
    dtype: torch.dtype | None,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run forward and backward, adding the gradient of a batch to that of the parameters.

    Args:
        model: model in training mode that maps a batch to a dict of losses.
        batch: mapped images in Detectron2's format.
        dtype: dtype of autocast; None to disable it.
        scale: function applied to the total loss before the backward pass.

    Returns:
        The unscaled losses, as float32 scalars without gradient.
    """
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype, enabled=dtype is not None):
        losses = model(batch)
    loss = torch.stack([value.float() for value in losses.values()]).sum()
    (loss if scale is None else scale(loss)).backward()
    return {name: value.detach().float() for name, value in losses.items()}


def precision(cfg: CfgNode) -> torch.dtype | None:
    """Return the dtype of autocast; None without autocast.

    Raises:
        UserError: the precision is unknown, or the device does not support it.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    name = cfg.SOLVER.AMP.PRECISION
    if name not in dtypes:
        raise UserError(f"SOLVER.AMP.PRECISION {name!r} is unknown: choose {' or '.join(dtypes)}.")
    if name == "float16" and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        raise UserError("SOLVER.AMP.PRECISION float16 needs a GPU: use bfloat16 on a CPU.")
    return dtypes[name]


def _unscaled(loss: Tensor) -> Tensor:
    return loss


def _scaler() -> Any:
    """Return a ``GradScaler``, which torch before 2.3 has only in torch.cuda."""
    amp = torch.amp if hasattr(torch.amp, "GradScaler") else torch.cuda.amp
    return amp.GradScaler()
