"""The reader against the writers' own loaders: what torch, pickle and safetensors read, we read."""

import argparse
import datetime
import enum
import functools
import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from moco_common.reader.errors import CheckpointError
from moco_common.reader.formats import read_checkpoint
from moco_common.reader.records import Discarded
from tests.moco_det.convert_cases import same

TENSORS = {
    "float": torch.randn(4, 3, 2),
    "half": torch.randn(3).half(),
    "bfloat": torch.randn(3).bfloat16(),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "long": torch.arange(5),
    "byte": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "transposed": torch.randn(3, 5).T,
    "odd": torch.randn(7)[3:],
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files_equal_what_torch_load_reads(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pth"
    shared = torch.randn(6, 2)
    tree = {"state_dict": TENSORS | {"shared": shared, "view": shared[2:4]}, "epoch": 3, "l": [1.5]}
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    ours, theirs = read_checkpoint(path), torch.load(path)
    assert same(ours["state_dict"], theirs["state_dict"])
    assert (ours["epoch"], ours["l"]) == (3, [1.5])


def test_files_saved_without_checksums_are_read(tmp_path: Path) -> None:
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this version of torch always writes them")
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(TENSORS, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_checkpoint(tmp_path / "a.pth"), TENSORS)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_arrays_and_tensors_equal_what_pickle_reads(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pkl"
    arrays: dict[str, np.ndarray] = {
        "float": np.random.rand(3, 2).astype(np.float32),
        "fortran": np.asfortranarray(np.random.rand(3, 2)),
        "big_endian": np.arange(4, dtype=">f4"),
        "long": np.arange(4).reshape(2, 2),
        "scalar": np.array(5),
        "bool": np.array([True, False]),
    }
    path.write_bytes(
        pickle.dumps(arrays | {"number": np.float64(1.5), "tensor": TENSORS["odd"]}, protocol)
    )
    read = read_checkpoint(path)
    assert read["number"] == 1.5
    assert torch.equal(read["tensor"], TENSORS["odd"])
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name].numpy(), array)
        assert read[name].shape == array.shape


def test_a_whole_pickled_module_comes_as_its_tensors(tmp_path: Path) -> None:
    model = torch.nn.DataParallel(torchvision.models.resnet18(num_classes=2))
    torch.save(model, tmp_path / "a.pth")
    flat = {}

    def walk(node: dict, path: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{path}{key}.")
            elif value is not None:
                flat[path + key] = value

    walk(read_checkpoint(tmp_path / "a.pth"), "")
    assert same(flat, dict(model.state_dict()))


def test_safetensors_equal_what_its_library_reads(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    whole = {name: tensor.clone().contiguous() for name, tensor in TENSORS.items()}
    library.save_file(whole, tmp_path / "a.safetensors", metadata={"format": "pt"})
    read = read_checkpoint(tmp_path / "a.safetensors")
    assert read.pop("__metadata__") == {"format": "pt"}
    assert same(read, library.load_file(tmp_path / "a.safetensors"))


class _Config(dict):
    """Stands for mmcv's Config, Lightning's AttributeDict, ..."""


class _Kind(enum.Enum):
    A = 1


class _Callback:
    def __init__(self) -> None:
        self.best = torch.tensor(1.0)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore")
def test_wild_objects_are_discarded_and_the_tensors_around_them_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    path = tmp_path / "a.pth"
    wild = {
        "args": argparse.Namespace(lr=0.03, path=Path("x")),
        "hyper_parameters": _Config(a=1),
        "callbacks": {_Callback: _Callback()},
        "best": np.float32(0.5),
        "dtype": np.dtype("float32"),
        "objects": np.array([{}, 1], dtype=object),
        "set": {1, 2},
        "enumeration": _Kind.A,
        "time": datetime.datetime(2020, 1, 1),
        "optimiser": functools.partial(torch.optim.SGD, lr=0.1),
        "random": np.random.default_rng(0),
        "rng": random.getstate(),
        "class": torch.nn.Linear,
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "sparse": torch.eye(3).to_sparse(),
        "expanded": torch.ones(1).expand(5),
        "slice": slice(1, 2),
        "device": torch.device("cpu"),
        "state_dict": {"w": torch.ones(2), "p": torch.nn.Parameter(torch.ones(3))},
    }
    torch.save(wild, path, _use_new_zipfile_serialization=zipped)
    # Classes are not looked up even where they exist.
    monkeypatch.setattr(_Callback, "__new__", lambda *a: pytest.fail("constructed"), raising=False)
    read = read_checkpoint(path)
    assert same(read["state_dict"], {"w": torch.ones(2), "p": torch.ones(3)})
    assert read["best"] == 0.5
    assert isinstance(read["args"], Discarded)
    assert read["args"].values["lr"] == 0.03
    assert read["args"].name == "argparse.Namespace"
    assert read["hyper_parameters"].name.endswith("_Config")
    assert isinstance(read["objects"], Discarded)


def test_the_configurations_that_projects_save_are_read_over(tmp_path: Path) -> None:
    omegaconf, yacs = pytest.importorskip("omegaconf"), pytest.importorskip("yacs.config")
    config = {
        "hydra": omegaconf.OmegaConf.create({"a": 1, "b": [1, {"c": 2}]}),
        "yacs": yacs.CfgNode({"A": yacs.CfgNode({"b": 1})}),
    }
    torch.save({"hyper_parameters": config, "w": torch.ones(2)}, tmp_path / "a.pth")
    assert torch.equal(read_checkpoint(tmp_path / "a.pth")["w"], torch.ones(2))


def test_classes_that_do_not_exist_here_are_discarded(tmp_path: Path) -> None:
    stream = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01cmmcv.runner.log\nBuffer\nq\x02)\x81q\x03u."
    (tmp_path / "a.pkl").write_bytes(stream)
    assert read_checkpoint(tmp_path / "a.pkl")["a"].name == "mmcv.runner.log.Buffer"


def test_a_change_of_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    before = (tmp_path / "a.pth").read_bytes()
    read_checkpoint(tmp_path / "a.pth")["a"].zero_()
    assert (tmp_path / "a.pth").read_bytes() == before


def test_shared_parts_of_a_pickle_do_not_unfold(tmp_path: Path) -> None:
    tree: list = [torch.ones(1)]
    for _ in range(10):
        tree = [tree, tree]
    torch.save({"a": tree}, tmp_path / "a.pth")
    first, second = read_checkpoint(tmp_path / "a.pth")["a"]
    assert first is second
    for _ in range(50):  # 2^60 leaves for whoever follows every reference
        tree = [tree, tree]
    torch.save({"a": tree}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="repeats the same content"):
        read_checkpoint(tmp_path / "a.pth")
    buffer = io.BytesIO()
    circle: dict = {}
    circle["self"] = circle
    pickle.dump(circle, buffer)
    (tmp_path / "b.pkl").write_bytes(buffer.getvalue())
    assert read_checkpoint(tmp_path / "b.pkl")["self"].name == "part of itself"
