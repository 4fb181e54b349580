"""Snapshots: what is written behind the training is what would have been written at once."""

import threading

import pytest
import torch

from pretrain.checkpoint import format as checkpoint
from pretrain.checkpoint.async_writer import Snapshots


def state(step):
    torch.manual_seed(step)
    convolution = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    matrix = torch.randn(6, 5)
    return {
        "format": checkpoint.FORMAT,
        "step": step,
        "config": "SEED: 0\n",
        "state_dict": {**convolution.state_dict(), "queue": matrix, "queue_ptr": torch.ones(1)},
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.randn(3)}},
            "param_groups": [{"lr": 1}],
        },
        "ranks": {"torch": torch.get_rng_state()[None], "pair": (torch.ones(2), None)},
    }


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def test_a_snapshot_is_byte_for_byte_the_checkpoint_written_at_once(tmp_path):
    """Even when training goes on before the writer has begun."""
    at_once, behind = tmp_path / "a", tmp_path / "b"
    with Snapshots(behind, keep=3) as snapshots:
        for step in (1, 2):
            checkpoint.save(state(step), at_once, keep=3)
            live = state(step)
            snapshots.take(live)
            for tensor in tensors(live):
                tensor.zero_()
    for step in (1, 2):
        name = f"checkpoint_{step:08d}.pth"
        assert (behind / name).read_bytes() == (at_once / name).read_bytes()
    assert snapshots.last == behind / name


def test_buffers_are_reused_where_they_fit_and_replaced_where_they_do_not(tmp_path):
    snapshots = Snapshots(tmp_path, keep=1)
    first = state(1)
    snapshots.reserve(first)
    places = [buffer.data_ptr() for buffer in tensors(snapshots._buffers)]
    assert not {tensor.data_ptr() for tensor in tensors(first)} & set(places)
    snapshots.take(state(2))
    snapshots.finish()
    assert [buffer.data_ptr() for buffer in tensors(snapshots._buffers)] == places
    other = state(3)
    other["state_dict"]["queue"] = torch.randn(7, 5, dtype=torch.float64)
    snapshots.take(other)
    snapshots.finish()
    loaded = checkpoint.load(tmp_path / checkpoint.LAST)
    assert torch.equal(loaded["state_dict"]["queue"], other["state_dict"]["queue"])


def test_a_second_snapshot_waits_for_the_first(tmp_path, monkeypatch):
    go_on, order = threading.Event(), []
    save = checkpoint.save

    def slow(value, *args, **kwargs):
        go_on.wait(10)
        order.append(value["step"])
        return save(value, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", slow)
    with Snapshots(tmp_path, keep=5) as snapshots:
        snapshots.take(state(1))
        threading.Timer(0.2, go_on.set).start()
        snapshots.take(state(2))
        assert order[:1] == [1]
    assert order == [1, 2]
    assert checkpoint.load(tmp_path / "checkpoint_00000001.pth")["step"] == 1


def test_an_error_of_the_writer_is_raised_at_the_next_step_or_at_the_end(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "save", broken)
    snapshots = Snapshots(tmp_path, keep=1)
    snapshots.take(state(1))
    snapshots._writer.join()
    with pytest.raises(OSError, match="Input/output"):
        snapshots.check()
    snapshots.check()  # once
    with pytest.raises(OSError, match="Input/output"), snapshots:
        snapshots.take(state(2))
    snapshots.take(state(3))
    with pytest.raises(KeyError), snapshots:  # the first error is the one to tell
        raise KeyError
