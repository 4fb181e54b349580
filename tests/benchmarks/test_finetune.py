"""The fine-tuning step against Detectron2's own loop, at the size of a test."""

import re

import pytest

from benchmarks import finetune


@pytest.mark.parametrize("protocol", ["VOC-random", "COCO-FPN-1x-random"])
def test_the_steps_losses_are_detectron2s_to_the_last_bit(protocol, capsys):
    finetune.main(["--quick", "--protocol", protocol])
    text = capsys.readouterr().out
    assert "losses of 3 steps equal to the last bit: loss_" in text
    assert ("loss_mask" in text) == (protocol == "COCO-FPN-1x-random")
    assert re.search(r"^ratio finetune_step \d+\.\d\d$", text, re.MULTILINE)


def test_other_random_numbers_are_noticed(monkeypatch):
    monkeypatch.setattr(finetune, "seed_model", lambda *_: None)
    with pytest.raises(AssertionError, match="the losses differ"):
        finetune.compare("VOC-random", 1, full=False)
