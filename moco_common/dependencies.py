"""Packages that `pip install moco-det` does not install, and the error about a missing one."""

from importlib.util import find_spec

from moco_common.errors import UserError

OPENCV = (
    "OpenCV (cv2), which is not a declared requirement because several packages provide it: "
    "pip install opencv-python-headless."
)
DETECTRON2 = (
    "Detectron2, which is not on the package index under its own name: see 'Installation' in the "
    "README (`make setup`, or build it from upstream's git repository after installing torch, "
    "with `pip install --no-build-isolation`)."
)


class MissingPackageError(UserError, ModuleNotFoundError):
    """Raised for a package that must be installed first; also an ImportError, for `try: import`."""


def require(package: str, module: str, description: str) -> None:
    """Check that ``module`` can be imported, without importing it.

    Args:
        package: name of the package that needs it.
        description: description of the module, and how to install it.

    Raises:
        MissingPackageError: the module is not installed.
    """
    if find_spec(module) is None:
        raise MissingPackageError(f"{package} needs {description}", name=module)
