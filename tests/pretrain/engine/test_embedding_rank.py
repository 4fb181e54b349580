"""RankMe on its closed forms, and of what an encoder has computed last."""

import json

import pytest
import torch
from torch import nn

from pretrain.engine.embedding_rank import RecentEmbeddings, rank_me
from pretrain.engine.health_monitor import Monitor
from pretrain.engine.train_loop import train
from tests.pretrain import tiny
from tests.pretrain.runs import write_photographs


@pytest.mark.parametrize(("n", "d"), [(5, 5), (64, 8), (8, 64)])
def test_rank_1_gives_1_and_orthonormal_vectors_their_number(n, d):
    direction = torch.randn(d)
    assert rank_me(direction.expand(n, d) * torch.rand(n, 1)) == pytest.approx(1, abs=1e-9)
    orthonormal = torch.linalg.qr(torch.randn(max(n, d), min(n, d)))[0]
    rows = orthonormal if n >= d else orthonormal.T
    if n <= d:  # rows of length 1 already
        assert rank_me(rows) == pytest.approx(n, abs=1e-4)
    repeated = torch.eye(d).repeat(3, 1)  # each direction equally often
    assert rank_me(repeated) == pytest.approx(d, abs=1e-9)
    assert rank_me(torch.zeros(n, d)) == 0.0


def test_it_is_the_papers_formula_on_singular_values():
    x = torch.randn(50, 7, dtype=torch.float64) * torch.arange(1, 8)
    x /= x.norm(dim=1, keepdim=True)
    p = torch.linalg.svdvals(x) / torch.linalg.svdvals(x).sum()
    expected = torch.exp(-sum(q * q.log() for q in p))
    assert rank_me(x) == pytest.approx(expected.item(), rel=1e-9)
    assert rank_me(x.repeat(4, 1)) == pytest.approx(expected.item(), rel=1e-9)
    assert rank_me(x[:5]) <= 5


def test_only_the_last_embeddings_of_training_count():
    encoder = nn.Linear(4, 4, bias=False)
    nn.init.eye_(encoder.weight)
    recent = RecentEmbeddings(encoder, most=8)
    assert recent.rank() is None
    for _ in range(5):
        encoder(torch.eye(4))
    assert recent.rank() == pytest.approx(4)
    encoder.eval()(torch.ones(8, 4))
    assert recent.rank() == pytest.approx(4)
    encoder.train()(torch.ones(4, 4))
    encoder(torch.ones(4, 4))
    assert recent.rank() == pytest.approx(1)


def test_embeddings_on_a_line_are_warned_of_although_they_spread():
    monitor = Monitor(6.9, patience=0)
    texts = [monitor.observe(step, 5.0, 0.8, 0.1, 1.3) for step in range(5)]
    assert "along one dimension only (RankMe 1.3)" in texts[2]
    assert not any(texts[:2] + texts[3:])
    healthy = Monitor(6.9, patience=0)
    assert not any(healthy.observe(step, 5.0, 0.8, 0.1, 20.0) for step in range(5))


@pytest.mark.parametrize("method", ["moco-v2", "swav"])
def test_a_run_records_its_rank_in_bounds(tmp_path, method):
    photographs = write_photographs(tmp_path / "photographs")
    train(tiny.recipe(method, photographs, tmp_path / "run"), quiet=True)
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    ranks = [json.loads(line)["rank_me"] for line in lines]
    assert len(ranks) == 6
    assert all(1 <= rank <= 8 for rank in ranks)
