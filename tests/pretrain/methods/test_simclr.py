"""SimCLR against its Algorithm 1 written naively."""

import copy

import torch
import torch.nn.functional as F

from pretrain.methods.components import encode_together
from tests.pretrain import tiny


def test_loss_and_gradients_are_those_of_algorithm_1():
    method, _ = tiny.build("simclr", "SIMCLR.TEMPERATURE", 0.3)
    encoder = copy.deepcopy(method.encoder_q)
    views = tiny.views("simclr", 0)
    outputs = method(views, 0, tiny.index(0))
    outputs["loss"].backward()
    pairs = torch.stack(views, 1).flatten(0, 1)  # the paper's order: 2k-1 and 2k show one image
    z = F.normalize(encoder(pairs), dim=1)
    loss, correct = 0.0, 0
    for i in range(2 * tiny.BATCH):
        j = i + 1 if i % 2 == 0 else i - 1
        others = {k: torch.exp(z[i] @ z[k] / 0.3) for k in range(2 * tiny.BATCH) if k != i}
        loss = loss - torch.log(others[j] / sum(others.values())) / (2 * tiny.BATCH)
        correct += max(others, key=lambda k: others[k].item()) == j
    loss.backward()
    torch.testing.assert_close(outputs["loss"], loss)
    assert outputs["accuracy"].item() * 2 * tiny.BATCH == correct
    for p, expected in zip(method.parameters(), encoder.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-6, atol=1e-9)


def test_views_encoded_together_share_the_statistics_of_their_group_only():
    """Group g of one process sees what rank g of several would: its share of every view."""
    method, _ = tiny.build("simclr", "MODEL.BN_GROUPS", 2)
    views = tiny.views("simclr", 0)
    with torch.no_grad():
        together = encode_together(method.encoder_q, views, 2)
        one = tiny.build("simclr")[0].encoder_q
        for g in range(2):
            share = [view.chunk(2)[g] for view in views]
            alone = one(torch.cat(share)).chunk(2)
            for v in range(2):
                torch.testing.assert_close(together[v].chunk(2)[g], alone[v])
