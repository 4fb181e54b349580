"""Measuring a frozen backbone: weighted kNN, the linear protocol, and kNN during pre-training."""
