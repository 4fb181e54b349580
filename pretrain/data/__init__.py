"""Data loading: from image files to batches of augmented views."""
