"""Measuring a frozen backbone: weighted kNN, the linear protocol, and kNN during pre-training."""

from pretrain.probe.online import OnlineKNN, build_online_knn

__all__ = ["OnlineKNN", "build_online_knn"]
