"""The checkpoints of a run, written atomically and read without executing code."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from moco_common.errors import UserError
from moco_common.files import replace_file, replace_text
from moco_det.checkpoint.detector_weights import load_detector, read_detector

log = logging.getLogger(__name__)
WEIGHTS_ALONE = ("model_best.pth", "model_ema.pth")  # beside the checkpoints of a run
_NAME = re.compile(r"[\w.-]+\.pth")  # of a checkpoint in ``last_checkpoint``
# Raised by torch, fvcore and Detectron2 for a state that is another run's, or malformed.
_MISFITS = (RuntimeError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError)


class RunCheckpointer(Checkpointer):
    """fvcore's checkpointer with atomic writes, a safe reader and exact names.

    The files have Detectron2's format (``model_final.pth`` with ``model``, ``trainer`` and
    ``iteration``; ``last_checkpoint`` names the newest), so its tools can read them.
    """

    def __init__(self, model: torch.nn.Module, save_dir: str, **checkpointables: Any) -> None:
        super().__init__(model, save_dir, save_to_disk=comm.is_main_process(), **checkpointables)

    def save(self, name: str, **kwargs: Any) -> None:
        """Write model, checkpointables and ``kwargs`` to ``save_dir/NAME.pth``."""
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: thing.state_dict() for key, thing in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **states, **kwargs}
        replace_file(Path(self.save_dir, f"{name}.pth"), lambda file: torch.save(data, file))
        self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, model: torch.nn.Module, **facts: Any) -> None:
        """Write the weights of a model and facts about them to ``save_dir/NAME.pth``, from which no
        run resumes (see `WEIGHTS_ALONE`)."""
        if self.save_dir and self.save_to_disk:
            data = {"model": model.state_dict(), **facts}
            replace_file(Path(self.save_dir, f"{name}.pth"), lambda file: torch.save(data, file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the newest checkpoint in ``save_dir/last_checkpoint``."""
        replace_text(Path(self.save_dir, "last_checkpoint"), last_filename_basename)

    def load(self, path: str, checkpointables: Iterable[str] | None = None) -> dict[str, Any]:
        """Load the model and the named checkpointables (all by default).

        Returns:
            The other entries of the file, such as ``iteration``.

        Raises:
            UserError: the checkpoint is of a different detector or lacks a checkpointable.
        """
        return self._take(read_detector(path), path, checkpointables)

    def load_newest(self) -> dict[str, Any] | None:
        """Load the newest readable checkpoint of the run; return None if there is no checkpoint.

        A damaged file (after a full disk or a system crash) is skipped with a warning.

        Raises:
            UserError: no checkpoint can be read, or it is of a different detector.
        """
        refused = None
        if (name := _tagged(Path(self.save_dir))) is not None and not _NAME.fullmatch(name):
            log.warning("warning: %s/last_checkpoint names no checkpoint", self.save_dir)
        for path in newest_checkpoints(self.save_dir):
            try:
                checkpoint = read_detector(path)
            except UserError as error:
                refused = refused or error
                log.warning("warning: skipped: %s", error)
            else:
                return self._take(checkpoint, str(path), None)
        if refused:
            raise refused
        return None

    def _take(
        self, checkpoint: dict[str, Any], path: str, checkpointables: Iterable[str] | None
    ) -> dict[str, Any]:
        wanted = list(self.checkpointables if checkpointables is None else checkpointables)
        for key in wanted:
            if key not in checkpoint:
                raise UserError(
                    f"{path} holds no {key} state: a run cannot resume from weights alone; start a "
                    "new run with it as MODEL.WEIGHTS."
                )
        load_detector(self.model, checkpoint.pop("model"), source=path)
        for key in wanted:
            try:
                self.checkpointables[key].load_state_dict(_owned(checkpoint.pop(key)))
            except _MISFITS as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"the {key} state of {path} does not fit this run ({reason}): use another "
                    "checkpoint or --output-dir."
                ) from None
        return checkpoint


def newest_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a run: the one named by ``last_checkpoint``, then the others from
    newest to oldest."""
    folder = Path(folder)
    files = (path for path in folder.glob("model_*.pth") if path.name not in WEIGHTS_ALONE)
    paths = sorted(files, key=lambda p: p.name, reverse=True)  # final first
    name = _tagged(folder)
    if name is None or not _NAME.fullmatch(name):
        return paths
    named = folder / name
    return [named, *(path for path in paths if path != named)]


def _tagged(folder: Path) -> str | None:
    """Return the content of ``last_checkpoint``; None if there is no such file."""
    tag = folder / "last_checkpoint"
    return tag.read_bytes()[:256].decode(errors="replace").strip() if tag.is_file() else None


def _owned(tree: Any) -> Any:
    """Copy the tensors of a tree, which are views of a file: an optimizer updates them in place."""
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: _owned(value) for key, value in tree.items()}
    return type(tree)(map(_owned, tree)) if isinstance(tree, (list, tuple)) else tree
