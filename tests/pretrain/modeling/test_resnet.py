"""Our ResNets against torchvision's, split BN against separate BN layers."""

import pytest
import torch
import torchvision
from torch import nn

from moco_common.errors import UserError
from pretrain.modeling.batch_norm import SplitBatchNorm1d, SplitBatchNorm2d, bn_groups_per_rank
from pretrain.modeling.resnet import Normalize, ResNet


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"depth": 18}),
        ("resnet34", {"depth": 34}),
        ("resnet50", {"depth": 50}),
        ("resnet152", {"depth": 152}),
        ("resnext50_32x4d", {"depth": 50, "groups": 32, "width_per_group": 4}),
        ("resnext101_32x8d", {"depth": 101, "groups": 32, "width_per_group": 8}),
        ("wide_resnet50_2", {"depth": 50, "width_per_group": 128}),
    ],
)
def test_every_resnet_equals_torchvisions_with_the_same_tensors(name, kwargs):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=7)
    ours = ResNet(**kwargs, head=lambda features: nn.Linear(features, 7))
    ours.load_state_dict(theirs.state_dict())  # strict: the same names and shapes
    images = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        theirs.train(mode)
        ours.train(mode)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    statistics = {k: v for k, v in theirs.state_dict().items() if "running" in k}
    for name, value in statistics.items():
        torch.testing.assert_close(ours.state_dict()[name], value)


@pytest.mark.parametrize(("width", "features"), [(0.25, 512), (0.5, 1024), (2, 4096)])
def test_width_multiplies_every_channel(width, features):
    with torch.device("meta"):
        narrow, full = ResNet(50, width=width), ResNet(50)
    assert narrow.num_features == features
    for (name, a), (_, b) in zip(narrow.named_parameters(), full.named_parameters(), strict=True):
        assert a.shape[0] == width * b.shape[0], name


def test_uint8_images_are_normalised_as_torchvision_does():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    reference = torchvision.transforms.functional.normalize(
        images / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    torch.testing.assert_close(Normalize()(images), reference, rtol=1e-5, atol=1e-5)
    net = ResNet(18, width=0.125).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            net(images.repeat(1, 1, 4, 4)), net(net.normalize(images).repeat(1, 1, 4, 4))
        )


@pytest.mark.parametrize("channels_last", [False, True])
def test_split_bn_equals_a_bn_layer_for_each_slice(channels_last):
    torch.manual_seed(0)
    x = torch.randn(12, 5, 4, 3)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    split = SplitBatchNorm2d(5, groups=3)
    layers = [nn.BatchNorm2d(5) for _ in range(3)]
    weight, bias = torch.randn(5), torch.randn(5)
    for layer in [split, *layers]:
        layer.weight.data.copy_(weight)
        layer.bias.data.copy_(bias)
    for _ in range(2):  # the second pass starts from moved statistics
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = split(a)
        expected = torch.cat([layer(b[4 * i : 4 * i + 4]) for i, layer in enumerate(layers)])
        torch.testing.assert_close(out, expected)
        (out * x).sum().backward()
        (expected * x).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(layer, name) for layer in layers]).mean(0)
        torch.testing.assert_close(getattr(split, name), mean)
    assert split.num_batches_tracked == 2
    split.eval()
    torch.testing.assert_close(
        split(x), nn.functional.batch_norm(x, split.running_mean, split.running_var, weight, bias)
    )


def test_split_bn_of_vectors_equals_batch_norm_1d_in_each_slice():
    torch.manual_seed(0)
    x = torch.randn(8, 5)
    plain = nn.BatchNorm1d(5)
    expected = torch.cat([plain(x[:4]), plain(x[4:])])
    torch.testing.assert_close(SplitBatchNorm1d(5, groups=2)(x), expected)


def test_split_bn_refuses_a_batch_that_has_no_equal_slices():
    with pytest.raises(ValueError, match="7 cannot be split into 2"):
        SplitBatchNorm2d(3, groups=2)(torch.randn(7, 3, 2, 2))


@pytest.mark.parametrize(
    ("total", "batch", "world", "expected"),
    [(8, 256, 1, 8), (8, 64, 4, 2), (8, 32, 8, 1), (8, 4, 64, 1), (8, 16, 1, 4), (8, 3, 1, 1)]
    + [(8, 28, 1, 7), (8, 30, 1, 6), (3, 64, 2, 1)],
)
def test_bn_groups_keep_their_number_over_ranks_and_four_images(total, batch, world, expected):
    assert bn_groups_per_rank(total, batch, world) == expected


@pytest.mark.parametrize("kwargs", [{"depth": 42}, {"depth": 18, "groups": 32}, {"width": 0}])
def test_an_impossible_architecture_is_one_sentence(kwargs):
    with pytest.raises(UserError, match="choose"):
        ResNet(**kwargs)
