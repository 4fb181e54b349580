"""One optimisation step: forward, backward, update, the same for every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain import distributed
from pretrain.methods.base import Method


class TrainStep:
    """Runs a method's steps; owns its optimiser.

    Args:
        method: on its device.
        optimizer: over the method's parameters that require gradients.
        total_steps: length of the run, for the method's own schedules.
    """

    def __init__(
        self, method: Method, optimizer: torch.optim.Optimizer, *, total_steps: int
    ) -> None:
        self.method, self.optimizer, self.total_steps = method, optimizer, total_steps
        self.parallel = distributed.wrap(method)

    def __call__(
        self, views: Sequence[Tensor], index: Tensor, step: int, lr: float
    ) -> dict[str, Tensor]:
        """Take one step at learning rate ``lr``; return the method's scalars, detached."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        outputs = self.parallel(views, step, index)
        self.optimizer.zero_grad(set_to_none=True)
        outputs["loss"].backward()
        self.method.before_update(step)
        self.optimizer.step()
        self.method.after_update(step, self.total_steps)
        return {name: value.detach() for name, value in outputs.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
