"""The pre-training methods by name.

Each method is one file that declares its keys, its views, its chance loss and what the inspector
can look at; see `pretrain.methods.base`, and `docs/adding-a-method.md` for an example. Importing
this package is cheap: torch is loaded only when a method is needed.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moco_common.errors import UserError
from moco_common.text import counted

if TYPE_CHECKING:
    import numpy as np
    from fvcore.common.config import CfgNode

    from pretrain.methods.base import Method

METHODS = {  # name -> module and class
    "moco": "pretrain.methods.moco:MoCo",
    "end-to-end": "pretrain.methods.end_to_end:EndToEnd",
    "memory-bank": "pretrain.methods.memory_bank:MemoryBank",
    "simclr": "pretrain.methods.simclr:SimCLR",
    "byol": "pretrain.methods.byol:BYOL",
    "swav": "pretrain.methods.swav:SwAV",
    "dense-cl": "pretrain.methods.dense_cl:DenseCL",
    "pixpro": "pretrain.methods.pixpro:PixPro",
    "slot-con": "pretrain.methods.slot_con:SlotCon",
    "supervised": "pretrain.methods.supervised:Supervised",
}


class Declaration(NamedTuple):
    """The declarations of a method's file.

    Attributes:
        keys: its own keys, dotted, with default and description (``KEYS``).
        shared: sections of other methods that it reads as well (``SHARED``).
        explanation: the first paragraph of the file's docstring.
    """

    keys: dict[str, tuple[Any, str]]
    shared: tuple[str, ...]
    explanation: str

    @property
    def sections(self) -> set[str]:
        """Sections of the configuration that the method reads beside the common ones."""
        return {*self.shared, *(key.partition(".")[0] for key in self.keys)}


def declaration(name: str) -> Declaration:
    """Return the declarations of the file of the method called ``name``.

    Raises:
        UserError: there is no such method.
    """
    return _declaration(_target(name).partition(":")[0])


@cache
def _declaration(module: str) -> Declaration:
    # The literals are read without running the file: a command line can then be checked, and a
    # mistake in it reported, without the seconds that importing torch takes.
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"METHODS names the module {module}, which does not exist")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    assigned = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    literals = {n: ast.literal_eval(assigned[n]) for n in ("KEYS", "SHARED") if n in assigned}
    explanation = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
    return Declaration(literals.get("KEYS", {}), literals.get("SHARED", ()), explanation)


def method_class(name: str) -> type[Method]:
    """The class of the method called ``name``.

    Raises:
        UserError: there is no such method.
    """
    module, _, attribute = _target(name).partition(":")
    found: type[Method] = getattr(import_module(module), attribute)
    return found


def build_method(
    cfg: CfgNode, *, num_images: int, total_steps: int, labels: np.ndarray | None = None
) -> Method:
    """Build the method that ``METHOD`` names, for this rank's share of the batch.

    Args:
        labels: (num_images,) class of each image, if known.
    """
    import torch

    from moco_common import comm
    from moco_common.sync_batch_norm import synchronise_batch_norm
    from pretrain.methods.automatic import resolve
    from pretrain.methods.base import Run
    from pretrain.modeling.batch_norm import bn_groups_per_rank

    chosen = method_class(cfg.METHOD)
    if cfg.INPUT.SMALL_CROPS and chosen.view_names is not None:
        multi_crop = [name for name in METHODS if method_class(name).view_names is None]
        raise UserError(
            f"INPUT.SMALL_CROPS is {cfg.INPUT.SMALL_CROPS}, but {cfg.METHOD} uses only "
            f"{counted(len(chosen.view_names), 'view')} of an image: set it to 0, or choose a "
            f"method that uses small crops ({', '.join(multi_crop)})."
        )
    world = comm.world_size()
    cfg = resolve(cfg, num_images, world)
    groups = bn_groups_per_rank(cfg.MODEL.BN_GROUPS, cfg.SOLVER.BATCH_SIZE // world, world)
    classes = None if labels is None else torch.from_numpy(labels).long()
    run = Run(num_images, total_steps, 1 if cfg.MODEL.SYNC_BN else groups, classes)
    method = chosen.from_config(cfg, run)
    if cfg.MODEL.SYNC_BN:
        synchronise_batch_norm(method)
    return method


def _target(name: str) -> str:
    if name not in METHODS:
        raise UserError(f"METHOD is '{name}': choose one of {', '.join(METHODS)}.")
    return METHODS[name]
