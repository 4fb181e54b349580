"""No kind of run writes into the directory of another."""

import pytest

from moco_common.errors import UserError
from moco_common.run_lock import (
    FINE_TUNING,
    PRETRAINING,
    UNKNOWN,
    check_kind_of_run,
    kind_of_run,
)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("config.yaml", "DATA: []\nMETHOD: moco\nMODEL:\n  DEPTH: 50\n", PRETRAINING),
        ("config.yaml", "DATASETS:\n  TRAIN: []\nMODEL:\n  META_ARCHITECTURE: R\n", FINE_TUNING),
        ("config.yaml", "model: resnet\n", UNKNOWN),
        ("config.yaml", "a: &a [x, x]\nb: &b [*a, *a]\n\xff", UNKNOWN),
        ("config.yaml", "NOTE: |\n  METHOD: moco\n", UNKNOWN),
        ("metrics.json", "{}", UNKNOWN),
        ("checkpoint_last.pth", "", PRETRAINING),
        ("results.json", "{}", FINE_TUNING),
        ("last_checkpoint", "model_0000001.pth", FINE_TUNING),
        ("photo.jpg", "", None),
        ("log.txt", "", None),
    ],
)
def test_a_directory_tells_whose_it_is(tmp_path, name, text, kind):
    (tmp_path / name).write_text(text, encoding="latin-1")
    assert kind_of_run(tmp_path) == kind
    for own in (PRETRAINING, FINE_TUNING):
        if kind in (None, own):
            check_kind_of_run(tmp_path, own)
        else:
            with pytest.raises(UserError, match="choose another --output-dir"):
                check_kind_of_run(tmp_path, own)


def test_a_directory_that_does_not_exist_is_nobodys(tmp_path):
    assert kind_of_run(tmp_path / "new") is None
