"""The end-to-end mechanism against Figure 2a written naively."""

import copy

import torch
import torch.nn.functional as F

from tests.pretrain import tiny


def test_loss_and_gradients_of_both_encoders_are_the_formulas():
    groups, step = 4, 2
    method, cfg = tiny.build("end-to-end", "MODEL.BN_GROUPS", groups)
    f_q, f_k = copy.deepcopy(method.encoder_q), copy.deepcopy(method.encoder_k)
    method(tiny.views("end-to-end", step), step, tiny.index(step))["loss"].backward()

    def by_groups(encoder, images):
        """Each group with BN statistics of its own, by a pass of its own."""
        for module in encoder.modules():
            if hasattr(module, "groups") and isinstance(module, torch.nn.BatchNorm2d):
                module.groups = 1
        return torch.cat([F.normalize(encoder(part), dim=1) for part in images.chunk(groups)])

    x_q, x_k = tiny.views("end-to-end", step)
    generator = torch.Generator().manual_seed(cfg.SEED * 1_000_003 + step)
    order = torch.randperm(tiny.BATCH, generator=generator).tolist()
    q, shuffled = by_groups(f_q, x_q), by_groups(f_k, x_k[order])
    k = {image: shuffled[place] for place, image in enumerate(order)}
    loss = 0.0
    for i in range(tiny.BATCH):
        exponentials = [torch.exp(q[i] @ k[j] / 0.2) for j in range(tiny.BATCH)]
        loss = loss - torch.log(exponentials[i] / sum(exponentials)) / tiny.BATCH
    loss.backward()
    for ours, naive in ((method.encoder_q, f_q), (method.encoder_k, f_k)):
        for p, expected in zip(ours.parameters(), naive.parameters(), strict=True):
            assert expected.grad.abs().max() > 0
            torch.testing.assert_close(p.grad, expected.grad, rtol=1e-6, atol=1e-9)


def test_shuffling_changes_which_images_share_bn_statistics_and_nothing_else():
    images = tiny.views("end-to-end", 0)[1]
    for groups, differs in ((4, True), (1, False)):
        method, _ = tiny.build("end-to-end", "MODEL.BN_GROUPS", groups)
        shuffled = method.encode_keys(images, 0)
        method.shuffle = False
        change = (shuffled - method.encode_keys(images, 0)).abs().max()
        assert (change > 1e-3) == differs
