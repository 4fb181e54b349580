"""Shares of the labels: stratified, nested, repeatable."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from moco_common.errors import UserError
from moco_det.data.label_subsets import choose, image_key, register_label_share, stratified_prefix


def long_tailed(images=2000, classes=12, seed=0):
    """Images with a few classes each, whose frequencies fall from a half to a hundredth."""
    rng = np.random.default_rng(seed)
    chance = np.geomspace(0.5, 0.01, classes)
    return [
        {
            "image_id": f"{index:05d}",
            "file_name": f"{index}.jpg",
            "annotations": [
                {"category_id": k}
                for k in np.flatnonzero(rng.random(classes) < chance).tolist()
                for _ in range(1 + k % 3)
            ],
        }
        for index in range(images)
    ]


def images_with(records, label):
    return sum(any(a["category_id"] == label for a in r["annotations"]) for r in records)


def keys(records):
    return {image_key(record) for record in records}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_every_class_has_its_share_of_images(share):
    """Within two images and a twentieth; a plain draw is several times as far off."""
    records = long_tailed()
    chosen = choose(records, share, seed=0)
    assert len(chosen) == round(share * len(records))
    ours, drawn = [], []
    rng = np.random.default_rng(0)
    draws = [rng.choice(len(records), len(chosen), replace=False) for _ in range(20)]
    for label in range(12):
        even = share * images_with(records, label)
        ours.append(abs(images_with(chosen, label) - even))
        assert ours[-1] <= 2 + 0.05 * even
        drawn.append(
            np.mean([abs(images_with([records[i] for i in d], label) - even) for d in draws])
        )
    assert sum(ours) < 0.5 * sum(drawn)
    empty = sum(not record["annotations"] for record in records)
    assert (
        abs(sum(not r["annotations"] for r in chosen) - share * empty) <= 2 + 0.05 * share * empty
    )


def test_a_smaller_share_lies_inside_a_larger_one():
    records = long_tailed(500)
    subsets = [keys(choose(records, share, seed=0)) for share in (0.01, 0.1, 0.37, 1.0)]
    for small, large in zip(subsets, subsets[1:], strict=False):
        assert small < large


def test_the_subset_depends_on_the_seed_and_not_on_the_order_of_the_files():
    records = long_tailed(500)
    first = keys(choose(records, 0.1, seed=0))
    assert keys(choose(records[::-1], 0.1, seed=0)) == first
    moved = [{**record, "file_name": f"/elsewhere/{record['file_name']}"} for record in records]
    assert keys(choose(moved, 0.1, seed=0)) == first
    other = keys(choose(records, 0.1, seed=1))
    assert len(other & first) < 0.5 * len(first)


def test_records_without_annotations_are_drawn_evenly():
    records = [{"file_name": f"{i}.jpg", "image_id": i} for i in range(100)]
    chosen = choose(records, 0.25, seed=0)
    assert len(keys(chosen)) == 25
    assert stratified_prefix([[]] * 5, 3) == [0, 1, 2]


def test_a_registered_share_keeps_the_metadata_and_whole_data_stay_themselves():
    records = long_tailed(60)
    DatasetCatalog.register("whole", lambda: records)
    MetadataCatalog.get("whole").set(thing_classes=["a"], evaluator_type="coco", spec="here")
    try:
        assert register_label_share("whole", 1.0, 0) == "whole"
        name = register_label_share("whole", 0.1, 0)
        assert keys(DatasetCatalog.get(name)) == keys(choose(records, 0.1, 0))
        assert MetadataCatalog.get(name).thing_classes == ["a"]
        assert MetadataCatalog.get(name).name == name
        assert register_label_share("whole", 0.1, 0) == name  # again, as every process does
        assert len(DatasetCatalog.get(register_label_share("whole", 1e-9, 0))) == 1
        with pytest.raises(UserError, match=r"DATASETS\.LABEL_SHARE must be in \(0, 1\], not 10"):
            register_label_share("whole", 10, 0)
    finally:
        for entry in [n for n in DatasetCatalog.list() if n.startswith("whole")]:
            DatasetCatalog.remove(entry)
            MetadataCatalog.remove(entry)
