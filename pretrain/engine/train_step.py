"""One optimisation step, the same for every method: forward, backward, update."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moco_common.errors import UserError
from pretrain import distributed
from pretrain.methods.base import Method
from pretrain.modeling.resnet import ResNet
from pretrain.profiling import stage

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainStep:
    """The optimisation step of a method; owns the optimiser and the gradient scaler.

    Args:
        method: the method, already on its device and in its memory format.
        optimizer: optimiser of the method's parameters that require gradients.
        total_steps: length of the run, for the method's own schedules.
        precision: ``float32``, or ``bfloat16`` or ``float16`` for autocast inside all encoders,
            including those without gradients; parameters, embeddings and losses stay float32.
            With ``float16``, the loss is scaled to keep small gradients from vanishing, and a step
            with overflowing gradients leaves the parameters unchanged.
        compile: compile the encoders at the first step (minutes for a ResNet-50 on a CPU).

    Raises:
        UserError: the precision is unknown or not supported by this device or version of torch, or
            a required compiler is missing.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        self.method, self.optimizer, self.total_steps = method, optimizer, total_steps
        device = next(method.parameters()).device.type
        dtype = _autocast_dtype(precision, device)
        if device == "cuda":  # all batches have one size: let cuDNN time its algorithms on it
            torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
        if compile:
            _require_compiler(device)
        for module in method.modules():
            if isinstance(module, ResNet):
                module.autocast_dtype = dtype
                if compile:
                    module.compile()
        self.scaler = _scaler(device, enabled=dtype is torch.float16)
        self.parallel = distributed.wrap(method)

    def __call__(
        self,
        views: Sequence[Tensor],
        index: Tensor,
        step: int,
        lr: float,
        places: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Take one step at learning rate ``lr``; return the method's detached scalars.

        Args:
            places: (views, N, 5) see `Batch.places`, for a method that ``uses_places``.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.method.uses_places:
            assert places is not None
            places = places.to(views[0].device, non_blocking=True)
            outputs = self.parallel(views, step, index, places)
        else:
            outputs = self.parallel(views, step, index)
        self.optimizer.zero_grad(set_to_none=True)
        with stage("encoders: backward"):
            self.scaler.scale(outputs["loss"]).backward()
        with stage("machinery: optimiser"):
            self.scaler.unscale_(self.optimizer)
            self.method.before_update(step)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.method.after_update(step, self.total_steps)
        return {name: value.detach() for name, value in outputs.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the ``optimizer`` and, in float16, of the ``scaler``."""
        state = {"optimizer": self.optimizer.state_dict()}
        return state | {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; without a ``scaler`` in it, a float16 run starts a new one.

        The optimiser's settings remain those of this run, as they may be changed on resume.

        Raises:
            ValueError, KeyError, TypeError: the state is that of another network, or malformed.
        """
        saved, own = state["optimizer"], self.optimizer.state_dict()["param_groups"]
        groups = [
            {**group, "params": old["params"]}
            for group, old in zip(own, saved["param_groups"], strict=True)
        ]
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        for weights, values in self.optimizer.state.items():
            for name, value in values.items():
                fits = isinstance(value, Tensor) and value.shape == weights.shape
                if not fits and value is not None:
                    raise ValueError(f"the optimiser's {name} is not of its tensor's shape")
        if "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])


def _autocast_dtype(precision: str, device: str) -> torch.dtype | None:
    if precision not in PRECISIONS:
        raise UserError(
            f"SOLVER.PRECISION is '{precision}': choose one of {', '.join(PRECISIONS)}."
        )
    if precision == "float16" and device == "cpu" and not hasattr(torch.amp, "GradScaler"):
        raise UserError(
            f"SOLVER.PRECISION float16 needs a GPU or torch 2.3, but this is torch "
            f"{torch.__version__} on a CPU: choose bfloat16 or float32."
        )
    if precision == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(
            "SOLVER.PRECISION bfloat16 is not supported by this GPU: choose float16 or float32."
        )
    return PRECISIONS[precision]


def _scaler(device: str, enabled: bool) -> Any:
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)  # torch < 2.3


def _require_compiler(device: str) -> None:
    # On a CPU, torch.compile generates C++; its own error comes late and is a page long.
    choices = [os.environ.get("CXX"), "g++", "clang++"]
    if device == "cpu" and not any(name and shutil.which(name) for name in choices):
        raise UserError(
            "SOLVER.COMPILE needs a C++ compiler on a CPU, but none was found: install g++, set "
            "the environment variable CXX to a compiler, or set SOLVER.COMPILE False."
        )
