"""Loading of weights into a detector, and the checkpoints of a run."""
