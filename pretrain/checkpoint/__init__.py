"""Checkpoints of a run: their format, their writer, and what is checked before one is saved."""
