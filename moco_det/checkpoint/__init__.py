"""Weights into a detector, and checkpoints of a run."""
