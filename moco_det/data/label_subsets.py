"""A fixed share of the labels: stratified by class, nested, and the same on every machine.

The share is a prefix of one order of the images, so a smaller one lies inside a larger one. The
order is grown greedily: of a few images drawn at random the next is the one that brings the counts
of all classes closest to what an even share would hold (a randomised form of the iterative
stratification of Sechidis et al. 2011, "On the Stratification of Multi-Label Data").
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from moco_common.errors import UserError

CANDIDATES = 128  # images from which the best is taken


def register_label_share(name: str, share: float, seed: int) -> str:
    """Register a subset of a registered data set, and return its name.

    Args:
        name: the whole data set.
        share: share of its images, in (0, 1]; at least one is kept. 1 registers nothing.
        seed: selects one of the possible subsets.

    Raises:
        UserError: the share is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"DATASETS.LABEL_SHARE must be in (0, 1], not {share:g}.")
    if share == 1:
        return name
    subset = f"{name}_{share:g}_of_labels_{seed}"
    records = DatasetCatalog.get(name)  # also fills the metadata of Detectron2's own data sets
    chosen = {image_key(record) for record in choose(records, share, seed)}

    def load() -> list[dict[str, Any]]:
        return [record for record in DatasetCatalog.get(name) if image_key(record) in chosen]

    for catalog in (DatasetCatalog, MetadataCatalog):
        if subset in catalog:
            catalog.remove(subset)
    DatasetCatalog.register(subset, load)
    metadata = MetadataCatalog.get(name).as_dict()
    metadata.pop("name")
    MetadataCatalog.get(subset).set(**metadata)
    return subset


def choose(
    records: Sequence[Mapping[str, Any]], share: float, seed: int
) -> list[Mapping[str, Any]]:
    """Choose a subset of Detectron2's dataset dicts, whatever their order.

    A class counts once per image; images without objects are a class of their own. Records without
    ``annotations`` (semantic labels) are drawn at random.
    """
    ordered = sorted(records, key=lambda record: _draw(image_key(record), seed))
    labels = [
        sorted({annotation["category_id"] for annotation in record["annotations"]}) or [-1]
        if "annotations" in record
        else []
        for record in ordered
    ]
    count = max(1, round(share * len(ordered)))
    return [ordered[index] for index in stratified_prefix(labels, count)]


def stratified_prefix(labels: Sequence[Sequence[int]], count: int) -> list[int]:
    """Return the first ``count`` indices of the stratified order of some images.

    Args:
        labels: the classes of each image, in random order.
        count: in [0, len(labels)].
    """
    names = {name: column for column, name in enumerate(sorted({n for ls in labels for n in ls}))}
    totals = np.zeros(len(names))
    for name in (name for classes in labels for name in classes):
        totals[names[name]] += 1
    pool = np.zeros((min(CANDIDATES, len(labels)), len(names)))  # candidate x class
    members = np.full(len(pool), -1)
    waiting = iter(range(len(labels)))
    taken = np.zeros(len(names))
    order: list[int] = []

    def refill(place: int) -> None:
        members[place] = next(waiting, -1)
        pool[place] = 0
        if members[place] >= 0:
            pool[place, [names[name] for name in labels[members[place]]]] = 1

    for place in range(len(pool)):
        refill(place)
    for position in range(1, count + 1):
        even = totals * (position / len(labels))
        # Growth of the squared distance to an even share, each class weighted by its rarity.
        growth = (2 * (taken - even) + 1) / totals
        place = int(np.argmin(np.where(members >= 0, pool @ growth, np.inf)))
        order.append(int(members[place]))
        taken += pool[place]
        refill(place)
    return order


def image_key(record: Mapping[str, Any]) -> str:
    """An image's name, which does not depend on the location of its data set."""
    return str(record.get("image_id", Path(record["file_name"]).name))


def _draw(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()
