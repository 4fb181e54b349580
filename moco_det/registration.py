"""Registration of this package's heads and backbones without importing Detectron2 first."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRIES = "detectron2.modeling"
_OURS = "moco_det.modeling"  # registers its classes and functions when it is imported


def register_with_detectron2() -> None:
    """Register now if Detectron2's registries are imported, otherwise as soon as they are.

    Detectron2's modules are imported without their warnings (pkg_resources, torch.jit.script),
    about which a user can do nothing.
    """
    if _REGISTRIES in sys.modules:
        importlib.import_module(_OURS)
    else:
        sys.meta_path.insert(0, _Detectron2Finder())


class _Detectron2Finder(MetaPathFinder):
    """Find Detectron2's modules as usual, and add to what their import does."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != "detectron2":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                execute(module)
            if name == _REGISTRIES:
                importlib.import_module(_OURS)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
