"""Evaluation of frozen backbones: weighted kNN, the linear protocol, kNN during pre-training."""
