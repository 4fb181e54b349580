"""DenseCL against the formulas of its paper written as loops."""

import copy

import pytest
import torch
import torch.nn.functional as F

from moco_common.errors import UserError
from tests.pretrain import tiny

T = 0.2


def contrast(q, key, negatives):
    """Eq. 1 and 2 for one query."""
    exponentials = [torch.exp(q @ other / T) for other in (key, *negatives)]
    return -torch.log(exponentials[0] / sum(exponentials))


def cells_of(x, image):
    """The cells of one image's map, row by row."""
    _, _, height, width = x.shape
    return [x[image, :, i, j] for i in range(height) for j in range(width)]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_three_steps_are_those_of_the_formulas_cell_by_cell(batch_norm):
    overrides = ("DENSECL.WEIGHT", 0.3, "MOCO.MLP", True, "MOCO.MLP_BN", batch_norm)
    method, _ = tiny.build("dense-cl", *overrides, "MOCO.SHUFFLE_BN", False)
    query, key = copy.deepcopy(method.encoder_q), copy.deepcopy(method.encoder_k)
    queues = [list(method.queue.clone()), list(method.dense_queue.clone())]
    for step in range(3):
        views = tiny.views("dense-cl", step)
        outputs = method(views, step, tiny.index(step))
        for average, p in zip(key.parameters(), query.parameters(), strict=True):
            average.data.mul_(0.999).add_(p.data, alpha=0.001)
        (z, dense, features), (k, dense_k, features_k) = query(views[0]), key(views[1])
        assert dense.shape == (tiny.BATCH, 8, 2, 2)
        loss, right, keys, dense_keys = 0.0, [], [], []
        for i in range(tiny.BATCH):
            k_i = F.normalize(k[i], dim=0).detach()
            instance = contrast(F.normalize(z[i], dim=0), k_i, queues[0])
            own, others = cells_of(features, i), cells_of(features_k, i)
            vectors, keys_of_cells = cells_of(dense, i), cells_of(dense_k, i)
            dense_loss = 0.0
            for f, r in zip(own, vectors, strict=True):
                cosines = torch.stack([F.cosine_similarity(f, g, dim=0) for g in others])
                t = F.normalize(keys_of_cells[int(cosines.argmax())], dim=0).detach()
                r = F.normalize(r, dim=0)
                dense_loss = dense_loss + contrast(r, t, queues[1]) / len(own)
                right.append(bool(r @ t > max(r @ n for n in queues[1])))
            loss = loss + (0.7 * instance + 0.3 * dense_loss) / tiny.BATCH
            keys.append(k_i)
            dense_keys.append(F.normalize(sum(keys_of_cells) / len(own), dim=0).detach())
        torch.testing.assert_close(outputs["loss"], loss)
        assert outputs["dense_accuracy"].item() == pytest.approx(sum(right) / len(right))
        trained = [p for p in method.parameters() if p.requires_grad]
        torch.testing.assert_close(
            torch.autograd.grad(outputs["loss"], trained),
            torch.autograd.grad(loss, list(query.parameters())),
            rtol=1e-6,
            atol=1e-9,
        )
        queues = [(queues[0] + keys)[-21:], (queues[1] + dense_keys)[-21:]]
        for queue, expected in zip((method.queue, method.dense_queue), queues, strict=True):
            start = int(method.queue_ptr)
            torch.testing.assert_close(
                torch.cat([queue[start:], queue[:start]]), torch.stack(expected)
            )


def test_without_weight_it_takes_the_steps_of_moco():
    """The backbone's and the instance head's gradients are MoCo's."""
    method, _ = tiny.build("dense-cl", "DENSECL.WEIGHT", 0.0)
    moco, _ = tiny.build("moco")
    for ours, theirs in ((method.encoder_q, moco.encoder_q), (method.encoder_k, moco.encoder_k)):
        state = {n.replace("fc.instance.", "fc."): x for n, x in ours.state_dict().items()}
        theirs.load_state_dict({n: x for n, x in state.items() if not n.startswith("fc.dense")})
    views = tiny.views("dense-cl", 0)
    losses = [m(views, 0, tiny.index(0))["loss"] for m in (method, moco)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for name, p in moco.encoder_q.named_parameters():
        own = dict(method.encoder_q.named_parameters())[name.replace("fc.", "fc.instance.")]
        torch.testing.assert_close(own.grad, p.grad)


def test_a_weight_beyond_one_is_refused():
    with pytest.raises(UserError, match=r"DENSECL.WEIGHT is 1.5: it must lie in \[0, 1\]"):
        tiny.build("dense-cl", "DENSECL.WEIGHT", 1.5)
