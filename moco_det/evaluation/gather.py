"""Parts that evaluators share: gathering from all ranks, each image once, and a warning."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from detectron2.utils import comm

from moco_common.errors import UserError

logger = logging.getLogger(__name__)
Share = TypeVar("Share")  # the data that an evaluator keeps on one rank
NAMED = 20  # classes in a warning
PREDICTIONS_FILE = "coco_instances_results.json"  # Detectron2's name for COCO's result format


def shares_of_ranks(share: Share, distributed: bool) -> list[Share] | None:
    """Gather the shares of all ranks, in rank order, on the first rank; None elsewhere.

    Args:
        distributed: whether to gather; all ranks must then call this. If False, the result is
            this rank's share alone.
    """
    if not distributed:
        return [share]
    shares = comm.gather(share, dst=0)
    return shares if comm.is_main_process() else None


def report_absent(dataset_name: str, classes: Sequence[str], absent: Sequence[int]) -> None:
    """Warn about the classes of a test set, by index, that have no object to find."""
    if absent:
        shown = ", ".join(classes[index] for index in absent[:NAMED])
        more = f" and {len(absent) - NAMED} other classes" if len(absent) > NAMED else ""
        logger.warning(
            f"warning: {dataset_name} has no object of {shown}{more}: not in the mean AP"
        )


def images_once(
    dataset_name: str, seen: Sequence[Any], expected: Iterable[Any] | None = None
) -> list[int]:
    """Select each evaluated image once, as a repeated one would change the metric.

    A sampler that pads the shares of its processes gives some images to two of them. Only the
    first occurrence counts, with a warning.

    Args:
        seen: the image ids of all processes, in the order of their predictions.
        expected: the data set's image ids.

    Returns:
        Indices into ``seen``, in the order of ``expected`` (of ``seen`` where there is none), so
        that the result does not depend on the distribution over processes.

    Raises:
        UserError: an image is unknown or was not evaluated.
    """
    first: dict[Any, int] = {}
    for index, image in enumerate(seen):
        first.setdefault(image, index)
    if len(first) < len(seen):
        logger.warning(
            f"{len(seen) - len(first)} images of {dataset_name} were evaluated more than once: "
            "each counts once"
        )
    if expected is None:
        return list(first.values())
    known = dict.fromkeys(expected)
    unknown = [image for image in first if image not in known]
    lost = [image for image in known if image not in first]
    if unknown:
        raise UserError(f"image {unknown[0]} is not of {dataset_name}: evaluate on its own loader")
    if lost:
        raise UserError(
            f"{len(lost)} of {len(known)} images of {dataset_name} were not evaluated (first: "
            f"{lost[0]}): run the model over the whole data set"
        )
    return [first[image] for image in known]
