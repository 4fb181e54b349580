"""Numbers beside their nouns, in both packages."""

import pytest

import moco_det.wording
import pretrain.wording


@pytest.mark.parametrize("package", [pretrain, moco_det], ids=lambda package: package.__name__)
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
def test_one_is_singular_and_everything_else_plural(package, number, noun, spec, text):
    assert package.wording.counted(number, noun, spec) == text
