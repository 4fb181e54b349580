"""A fine-tuning run: set-up, trainer, hooks."""
