"""The checks that need a GPU, as one command with a time budget: ``moco-doctor --gpu``."""
