"""The readers' properties on many more damaged files, drawn anew each time: minutes, not seconds.

Run by name, as pytest does not collect it: `pytest tests/moco_det/soak_readers.py`.
"""

from hypothesis import HealthCheck, given, settings

from tests.moco_det.data.datasets.test_fuzz import (
    check_coco,
    check_voc,
    check_yolo,
    damaged_json,
    damaged_labels,
    damaged_xml,
    images,
    voc_folder,
    yolo_folder,
)

__all__ = ["images", "voc_folder", "yolo_folder"]
LONG = settings(
    max_examples=20_000,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@LONG
@given(data=damaged_json())
def test_damaged_json(images, data):
    check_coco(images, data)


@LONG
@given(data=damaged_xml())
def test_damaged_xml(voc_folder, data):
    check_voc(voc_folder, data)


@LONG
@given(data=damaged_labels())
def test_damaged_labels(yolo_folder, data):
    check_yolo(yolo_folder, data)
