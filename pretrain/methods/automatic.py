"""Values of keys that are ``auto``: they follow from the data, the batch and the machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fvcore.common.config import CfgNode

from moco_common.hardware import cpu_count

AUTO = "auto"
# Keys that take a whole number or `AUTO`.
KEYS = ("MOCO.QUEUE_SIZE", "MODEL.BN_GROUPS", "DATALOADER.NUM_WORKERS")
QUEUE_SIZE = 65536  # of the MoCo paper, for a million images
_SHORT = 512  # a shorter queue is easy to tell apart by shortcuts
_GROUP = 32  # images of a BN group, as in the MoCo paper: 256 on 8 GPUs
_MOST_WORKERS = 16


def queue_size(images: int) -> int:
    """Return the number of negatives for a run on so many images.

    A query's image is among the negatives, as an old key of its own, wherever the queue holds more
    keys than there are images, and often where it holds half as many. The queue is therefore the
    paper's, but at most a quarter of the images; down to 512 keys, at most half of them.
    """
    size = min(QUEUE_SIZE, max(images // 4, _SHORT), images // 2)
    return max(1, size - size % 8 if size > 8 else size)


def bn_groups(batch_size: int) -> int:
    """Return the number of BN groups for a batch over all ranks: one for every 32 images."""
    return max(1, batch_size // _GROUP)


def num_workers(ranks: int) -> int:
    """Return the number of decoding processes per rank: the cores, shared by the host's ranks."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks)
    return min(_MOST_WORKERS, max(1, cpu_count() // local))


def resolve(
    cfg: CfgNode, images: int, ranks: int = 1, recorded: Mapping[str, Any] | None = None
) -> CfgNode:
    """Return the configuration with a number in place of every `AUTO`.

    Args:
        images: number of images of the source.
        ranks: number of ranks of the run.
        recorded: values by dotted name that a run to resume has resolved before; they stay, even if
            the data have changed.
    """
    values = {
        "MOCO.QUEUE_SIZE": lambda: queue_size(images),
        "MODEL.BN_GROUPS": lambda: bn_groups(cfg.SOLVER.BATCH_SIZE),
        "DATALOADER.NUM_WORKERS": lambda: num_workers(ranks),
    }
    result = cfg.clone()
    for key in KEYS:
        section, leaf = key.split(".")
        if section in result and result[section].get(leaf) == AUTO:
            before = (recorded or {}).get(key)
            result[section][leaf] = before if isinstance(before, int) else values[key]()
    return result
