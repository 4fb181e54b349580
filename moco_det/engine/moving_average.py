"""An exponential moving average of the weights, evaluated beside them."""

from functools import partial
from typing import Any

from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from moco_det.checkpoint.run_checkpointer import RunCheckpointer
from moco_det.engine.hooks import PreciseBN, is_due

FILE = "model_ema"


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Return the moving average of a model's parameters, with a copy of its buffers.

    After step t (from 1), the average moves by ``1 - d`` towards the parameters, where ``d`` is the
    smaller of ``decay`` and ``t / (9 + t)``: a start that is forgotten within a few steps, as in
    TensorFlow's ExponentialMovingAverage with ``num_updates``.
    """
    return AveragedModel(model, avg_fn=partial(_move, decay))


def _move(decay: float, average: Tensor, parameter: Tensor, updates: Tensor | int) -> Tensor:
    steps = float(updates) + 1
    return average.lerp(parameter, 1 - min(decay, steps / (9 + steps)))


class MovingAverage(HookBase):
    """Updates the average after every step, and writes its weights before every evaluation.

    The file, ``model_ema.pth``, is a detector's like ``model_final.pth``.

    Args:
        average: of the model, from `averaged`.
        model: the trained model, not wrapped in DDP.
        precise: recomputes the BN statistics of the average; None without PreciseBN.
        checkpointer: of the run.
        period: iterations between two evaluations; 0 for the last one only.
    """

    def __init__(
        self,
        average: AveragedModel,
        model: nn.Module,
        precise: PreciseBN | None,
        checkpointer: RunCheckpointer,
        period: int,
    ) -> None:
        self.average, self.model = average.train(), model
        self.precise, self.checkpointer, self.period = precise, checkpointer, period

    def after_step(self) -> None:
        self.average.update_parameters(self.model)
        iteration = self.trainer.iter
        if is_due(iteration, self.period, self.trainer.max_iter):
            if self.precise is not None:
                self.precise.update_stats()
            self.checkpointer.save_weights(FILE, self.average.module, iteration=iteration)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.average.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average.load_state_dict(state_dict)
