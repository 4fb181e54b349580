"""Compiled training against ordinary training on two ranks. Minutes of C++ compilation:

python -m pytest tests/pretrain/soak_compile.py
"""

import shutil

import pytest
import torch

from tests.pretrain.engine.test_train_step import Stem, make, run
from tests.pretrain.ranks import on_ranks


def compiled_and_not():
    """Largest difference in losses and in the state, of a compiled and an ordinary run."""
    plain, compiled = make(Stem), make(Stem, compile=True)
    losses = run(compiled)
    difference = (losses - run(plain)).abs().max()
    states = plain.method.state_dict(), compiled.method.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        difference = torch.maximum(difference, (states[1][name] - value).abs().max())
    return torch.tensor([difference, losses.std()])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_encoders_train_as_ordinary_ones_on_two_ranks():
    for difference, spread in on_ranks(2, compiled_and_not):
        assert difference < 1e-4
        assert spread > 1e-3  # the runs went somewhere
