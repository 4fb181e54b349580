"""A run: the training loop, its step, its metrics, resume."""
