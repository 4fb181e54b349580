"""Numbers beside their nouns."""

import pytest

from moco_common.text import counted, duration


@pytest.mark.parametrize(
    ("number", "noun", "spec", "text"),
    [
        (1, "run", "", "1 run"),
        (2, "run", "", "2 runs"),
        (0, "image", "", "0 images"),
        (1, "class", "", "1 class"),
        (3, "class", "", "3 classes"),
        (2, "box", "", "2 boxes"),
        (2, "batch", "", "2 batches"),
        (12345, "image", ",", "12,345 images"),
        (0.5, "epoch", "g", "0.5 epochs"),
    ],
)
def test_one_is_singular_and_everything_else_plural(number, noun, spec, text):
    assert counted(number, noun, spec) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (3600, "1:00:00"), (1e6, "277:46:40")],
)
def test_durations_are_hours_minutes_and_seconds(seconds, text):
    assert duration(seconds) == text
