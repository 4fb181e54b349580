"""Checkpoints of a run: their format, their writer, and the checks before one is saved."""
