"""A digest of nested tensors and plain values."""

import hashlib

import torch


def digest(tree) -> str:
    """SHA-256 of every key, type, shape and bit."""
    total = hashlib.sha256()
    _add(tree, total)
    return total.hexdigest()


def _add(tree, total):
    if isinstance(tree, dict):
        for key in sorted(tree, key=str):
            total.update(f"{key!r}\n".encode())
            _add(tree[key], total)
    elif isinstance(tree, list | tuple):
        for item in tree:
            _add(item, total)
    elif isinstance(tree, torch.Tensor):
        total.update(f"{tree.dtype} {tuple(tree.shape)}\n".encode())
        total.update(tree.contiguous().numpy().tobytes())
    else:
        total.update(f"{tree!r}\n".encode())
