"""pretrain: from photographs to a checkpoint, by Momentum Contrast."""

from pretrain.version import __version__

__all__ = ["__version__"]
