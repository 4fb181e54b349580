"""The end-to-end mechanism against Figure 2a written naively."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretrain.modeling.resnet import ResNet
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


def kept_for_the_backward_pass(module, call):
    """Bytes that autograd holds when ``call`` has returned, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    assert result is not None
    return sum(storage.nbytes() for storage in kept.values())


def test_memory_grows_with_this_dictionary_and_not_with_mocos():
    def needed(name, batch, queue):
        method, _ = tiny.build(name, "MOCO.QUEUE_SIZE", queue)
        views = [view[:batch].clone() for view in tiny.views(name, 0)]
        index = torch.arange(batch)
        return kept_for_the_backward_pass(method, lambda: method(views, 0, index)["loss"])

    half, whole = (needed("end-to-end", batch, 16) for batch in (8, 16))
    assert whole == pytest.approx(2 * half, rel=0.02)
    assert needed("moco", 16, 16) == needed("moco", 16, 5000) == pytest.approx(whole / 2, rel=0.02)


def test_a_resnet_50_keeps_82_mib_of_an_image():
    """The figure of the class's documentation and of docs/recipes.md."""
    encoder = ResNet(50, head=lambda features: nn.Linear(features, 128))
    images = torch.randn(2, 3, 224, 224)
    needed = kept_for_the_backward_pass(encoder, lambda: encoder(images)) - images.nbytes
    assert needed / 2 / 2**20 == pytest.approx(82, abs=1)
