"""Checks of whether this machine is ready for a run."""
