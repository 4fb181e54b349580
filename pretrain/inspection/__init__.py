"""Looking into a pre-training run: curves, filters, neighbours, views, the geometry of its keys."""

from pretrain.inspection.inspect_run import Settings, inspect_run

__all__ = ["Settings", "inspect_run"]
