"""Checkpoint files read as data; the only way by which either package reads a file of tensors."""
