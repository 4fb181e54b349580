"""Which images, which pixels, which features: against torchvision, and against changes."""

import errno
import os

import cv2
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from moco_common.errors import UserError
from pretrain.data.decoding import decode
from pretrain.probe.backbone import (
    backbone_of,
    build_backbone,
    digest,
    fit_batch_norm,
    frozen,
    load_backbone,
)
from pretrain.probe.datasets import (
    Preprocessing,
    open_labelled,
    open_train_and_test,
    read_batches,
    stratified_split,
)
from pretrain.probe.features import ArrayCache, extract, stream_features
from tests.pretrain.probe_data import tiny_backbone, write_classes


@pytest.mark.parametrize("size", [(90, 61), (64, 64), (40, 173), (31, 30)])
def test_preprocessing_is_torchvisions_resize_and_centre_crop(size):
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), size[::-1])
    transforms = torchvision.transforms
    theirs = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32)])
    expected = torch.from_numpy(np.array(theirs(Image.fromarray(image)))).permute(2, 0, 1)
    ours = Preprocessing.of(32)(image)
    assert ours.dtype == torch.uint8
    assert (ours.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("share", [0.2, 0.5, 0.999])
def test_a_held_out_share_is_of_every_class_seeded_and_disjoint(share):
    labels = np.repeat([0, 1, 2, 3], [50, 10, 2, 1])
    np.random.default_rng(3).shuffle(labels)
    kept, held = stratified_split(labels, share, seed=1)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    counts = np.bincount(labels[held], minlength=4).tolist()
    assert counts == [min(round(share * 50), 49), min(round(share * 10), 9), 1, 0]
    assert held.tolist() == stratified_split(labels, share, seed=1)[1].tolist()
    assert held.tolist() != stratified_split(labels, share, seed=2)[1].tolist()


def test_test_images_take_the_numbers_of_the_training_classes(tmp_path):
    train = write_classes(tmp_path / "train", 2)
    test = write_classes(tmp_path / "test", 1, colours={"green": (0, 255, 0)})
    seen, unseen = open_train_and_test(str(train), str(test))
    assert seen.classes == unseen.classes == ("amber", "blue", "green")
    assert unseen.labels.tolist() == [2]


def test_folders_that_cannot_be_meant_are_refused_in_a_sentence(tmp_path):
    write_classes(tmp_path / "all" / "train", 1)
    write_classes(tmp_path / "all" / "val", 1, colours={"violet": (9, 9, 9), "amber": (0, 0, 0)})
    with pytest.raises(UserError, match="look like splits"):
        open_labelled(str(tmp_path / "all"))
    with pytest.raises(UserError, match="first violet"):
        open_train_and_test(str(tmp_path / "all/train"), str(tmp_path / "all/val"))
    with pytest.raises(UserError, match="is not in a class folder"):
        open_labelled(str(tmp_path / "all/train/blue"))
    one = write_classes(tmp_path / "one", 1, colours={"blue": (1, 1, 1)})
    with pytest.raises(UserError, match="contains only the class"):
        open_train_and_test(str(one))
    with pytest.raises(UserError, match="--holdout is 1.5"):
        stratified_split(np.zeros(4), 1.5, 0)
    with pytest.raises(UserError, match="below --crop-size"):
        Preprocessing(64, 32)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_features_of_torchvisions_networks_are_torchvisions(name, tmp_path):
    torch.manual_seed(0)
    peer = getattr(torchvision.models, name)(num_classes=3).eval()
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    backbone, config = load_backbone(tmp_path / "peer.pth")
    assert config is None
    peer.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.allclose(backbone.forward_features(images), peer(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("depth", "arguments"),
    [
        (18, {}),
        (34, {"width": 0.07}),
        (50, {"width": 0.3}),
        (101, {}),
        (50, {"width": 0.1, "width_per_group": 128}),
        (50, {"width": 0.5, "groups": 8, "width_per_group": 16}),
    ],
)
def test_a_backbone_is_rebuilt_from_its_tensors_without_a_random_number(depth, arguments):
    whole = tiny_backbone(depth, **arguments, head=lambda c: torch.nn.Linear(c, 5))
    before = torch.get_rng_state()
    copy = build_backbone(backbone_of(whole.state_dict()))
    assert torch.equal(before, torch.get_rng_state())
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(copy.forward_features(images), whole.forward_features(images))
    assert not copy.training
    assert not any(p.requires_grad for p in copy.parameters())


def test_what_is_no_backbone_is_refused_with_the_name_of_a_tensor(tmp_path):
    state = tiny_backbone().state_dict()
    cases = {
        "lacks 1 tensor, the first is layer3.1.bn2.bias": {
            k: v for k, v in state.items() if k != "layer3.1.bn2.bias"
        },
        "layer4.0.bn1.weight is \\(3,\\)": {**state, "layer4.0.bn1.weight": torch.ones(3)},
        "module.conv1.weight belongs to no ResNet": {f"module.{k}": v for k, v in state.items()},
        "holds no state dict": [1, 2],
        "stage: \\(0, 0, 0, 0\\)": {},
    }
    for message, content in cases.items():
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(UserError, match=message):
            load_backbone(tmp_path / "file.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "file.pth")  # a pickled object
    with pytest.raises(UserError, match="weight belongs to no ResNet"):
        load_backbone(tmp_path / "file.pth")
    with pytest.raises(UserError, match="nowhere.pth does not exist"):
        load_backbone(tmp_path / "nowhere.pth")


def test_safetensors_are_read_as_the_state_dict_is(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    whole = tiny_backbone(18)
    torch.save(whole.state_dict(), tmp_path / "dict.pth")
    library.save_file(whole.state_dict(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    backbones = [load_backbone(tmp_path / n)[0] for n in ("dict.pth", "a.safetensors")]
    assert {digest(backbone) for backbone in backbones} == {digest(whole)}


def test_a_backbone_outlives_its_file(tmp_path):
    whole = tiny_backbone(18)
    torch.save(whole.state_dict(), tmp_path / "a.pth")
    backbone, _ = load_backbone(tmp_path / "a.pth")
    (tmp_path / "a.pth").open("wb").close()  # a mapped page of it would end the process
    assert digest(backbone) == digest(whole)


def test_fitted_bn_statistics_are_the_means_over_the_batches():
    backbone = tiny_backbone()
    batches = [torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8) for n in (4, 4, 8)]
    weights = backbone.conv1.weight.clone()
    fit_batch_norm(backbone, batches)

    outputs = [
        backbone.conv1(backbone.normalize(batch)).transpose(0, 1).flatten(1) for batch in batches
    ]
    means = torch.stack([x.mean(1) for x in outputs]).mean(0)
    variances = torch.stack([x.var(1) for x in outputs]).mean(0)
    assert torch.allclose(backbone.bn1.running_mean, means, atol=1e-5)
    assert torch.allclose(backbone.bn1.running_var, variances, rtol=1e-4)
    assert torch.equal(backbone.conv1.weight, weights)
    assert backbone.bn1.momentum == 0.1
    assert not backbone.training


def test_a_backbone_in_training_mode_is_caught_by_its_bn_statistics():
    backbone = tiny_backbone().train()
    with pytest.raises(RuntimeError, match="frozen backbone changed"), frozen(backbone):
        backbone(torch.randn(4, 3, 32, 32))
    before = digest(backbone)
    backbone.layer4[1].bn2.bias.data[0] += 1e-6
    assert digest(backbone) != before


def test_extraction_proves_that_the_backbone_is_frozen(tmp_path):
    images = open_labelled(str(write_classes(tmp_path / "train", 3)))
    for cache in (None, ArrayCache(tmp_path / "cache")):
        with pytest.raises(RuntimeError, match="frozen backbone changed"):
            extract(tiny_backbone().train(), images, Preprocessing.of(32), cache=cache)
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_features_are_stored_once_and_stale_ones_are_noticed(tmp_path):
    folder = write_classes(tmp_path / "train", 5)
    cache, said = ArrayCache(tmp_path / "cache"), []
    images, look = open_labelled(str(folder)), Preprocessing.of(32)

    def get(backbone=None, images=images, look=look):
        said.clear()
        return extract(
            backbone or tiny_backbone(), images, look, name="train", cache=cache, say=said.append
        )

    first = get()
    fresh = extract(tiny_backbone(), images, look)
    assert not first.cached
    assert get().cached
    assert torch.equal(get().values, fresh.values)
    assert first.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5

    other = get(tiny_backbone(seed=1))
    assert not other.cached
    assert said == ["cached features of train are out of date (weights): extracting again"]
    assert not torch.equal(other.values, fresh.values)
    assert (
        "crop_size, resize" in (get(tiny_backbone(seed=1), look=Preprocessing.of(24)), said)[1][0]
    )
    assert "(weights, crop_size, resize)" in (get(), said)[1][0]

    os.utime(folder / "blue" / "01.jpg", ns=(1, 1))
    assert "out of date (images)" in (get(images=open_labelled(str(folder))), said)[1][0]
    (folder / "blue" / "04.jpg").unlink()
    assert len(get(images=open_labelled(str(folder)))) == 14
    assert "out of date (images)" in said[0]

    (tmp_path / "cache" / "train.npy").write_bytes(b"half")
    assert not get(images=open_labelled(str(folder))).cached
    assert "damaged" in said[0]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["train.json", "train.npy"]


def test_an_unreadable_image_is_left_out_and_named_and_many_are_an_error(tmp_path):
    folder = write_classes(tmp_path / "train", 8)
    (folder / "blue" / "03.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    images, backbone = open_labelled(str(folder)), tiny_backbone()
    clean = write_classes(tmp_path / "clean", 8)
    whole = extract(backbone, open_labelled(str(clean)), Preprocessing.of(32)).values
    kept = [i for i in range(24) if i != 8 + 3]
    for cache in (None, ArrayCache(tmp_path / "cache"), ArrayCache(tmp_path / "cache")):
        found = extract(backbone, images, Preprocessing.of(32), cache=cache, batch_size=3)
        assert len(found.skipped) == 1
        assert "03.jpg" in found.skipped[0]
        assert torch.allclose(found.values, whole[kept], atol=1e-5)
        assert found.labels.tolist() == [i // 8 for i in kept]
    assert found.cached
    (folder / "blue" / "04.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="2 of the 24 images images cannot be read"):
        extract(backbone, open_labelled(str(folder)), Preprocessing.of(32))


def test_images_are_streamed_one_batch_ahead(tmp_path):
    """Of any number of images two batches are in memory."""
    images, read = open_labelled(str(write_classes(tmp_path / "train", 10))), []
    original = images.read
    images.read = lambda index: (read.append(index), original(index))[1]
    batches = stream_features(tiny_backbone(), images, Preprocessing.of(32), batch_size=4)
    most = []
    for done, (rows, features, _) in enumerate(batches, start=1):
        assert features.shape == (len(rows), 32)
        most.append(len(read) - 4 * done)
    assert len(most) == 8
    assert max(most) <= 4
    assert sorted(read) == list(range(30))


def test_threads_change_neither_order_nor_pixels(tmp_path):
    images = open_labelled(str(write_classes(tmp_path / "train", 7)))
    one, many = (
        list(read_batches(images, Preprocessing.of(24), batch_size=4, threads=n)) for n in (1, 5)
    )
    assert [rows.tolist() for rows, _, _ in one] == [rows.tolist() for rows, _, _ in many]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(one, many, strict=True))


def test_disk_space_is_reserved_before_the_features_are_written(tmp_path, monkeypatch):
    """A page of a memory map that the full disk has no block for kills the process by SIGBUS."""
    cache = ArrayCache(tmp_path)
    with cache.create("x", {}, (1000, 512)):
        (unfinished,) = tmp_path.glob(".x.npy*")
        assert unfinished.stat().st_blocks * 512 >= 1000 * 512 * 4

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(UserError, match="could not be written .No space left"),
        cache.create("y", {}, (1000, 512)),
    ):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy", "x.json"}


def test_large_jpegs_are_decoded_in_full(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pretrain.probe.datasets.decode",
        lambda data, **options: asked.append(options) or decode(data),
    )
    images = open_labelled(str(write_classes(tmp_path / "train", 2)))
    list(read_batches(images, Preprocessing.of(8), batch_size=4))
    assert asked == [{}] * len(images)
