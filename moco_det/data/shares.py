"""A split by share: ``SPEC:90%`` and, for all other images, ``SPEC:90%-rest``.

The share is stratified by class and the same on every machine; see :mod:`label_subsets`.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from moco_common.errors import UserError
from moco_det.data.label_subsets import choose, image_key

SEED = 0


class Share(NamedTuple):
    """A share of a data set's images, or the rest of them."""

    percent: float
    rest: bool

    def of(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """These images, in the order of the data set."""
        names = sorted({i["category_id"] for record in records for i in record["annotations"]})
        number = {name: index for index, name in enumerate(names)}
        numbered = [
            {
                **record,
                "image_id": image_key(record),
                "annotations": [
                    {"category_id": number[item["category_id"]]} for item in record["annotations"]
                ],
            }
            for record in records
        ]
        chosen = {record["image_id"] for record in choose(numbered, self.percent / 100, SEED)}
        return [record for record in records if (image_key(record) in chosen) != self.rest]


def split_share(spec: str) -> tuple[str, Share | None]:
    """Split the share off a spec.

    Raises:
        UserError: it is not between 0 and 100 %.
    """
    match = re.search(r":(\d+(?:\.\d+)?)%(-rest)?$", spec)
    if match is None:
        return spec, None
    percent = parse_percent(f"{match[1]}%")
    return spec[: match.start()], Share(percent, match[2] is not None)


def parse_percent(text: str) -> float:
    """The percentage of a share such as ``90%``.

    Raises:
        UserError: it is not between 0 and 100 %.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%?", text)
    if match is None or not 0 < float(match[1]) < 100:
        raise UserError(f"a share is above 0 % and below 100 %, such as 90%, not '{text}'")
    return float(match[1])
