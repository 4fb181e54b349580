"""kNN during a run: what it measures, where it shows, and that the run does not notice it."""

import json
import re
from functools import partial

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco_common import comm
from moco_common.errors import UserError
from pretrain.config.defaults import load_config
from pretrain.engine.train_loop import train as train_run
from pretrain.engine.train_step import TrainStep
from pretrain.methods.moco import MoCo
from pretrain.modeling.heads import mlp_head
from pretrain.modeling.resnet import ResNet
from pretrain.probe.datasets import open_train_and_test
from pretrain.probe.features import extract
from pretrain.probe.knn import weighted_knn
from pretrain.probe.online import build_online_knn
from tests.pretrain import tiny
from tests.pretrain.probe_data import write_classes
from tests.pretrain.ranks import on_ranks


def config(data, **probe):
    pairs = ["INPUT.CROP_SIZE", "32", "SOLVER.BATCH_SIZE", "8", "DATALOADER.NUM_WORKERS", "2"]
    cfg = load_config("moco-v2", pairs)
    cfg.PROBE.DATA = str(data)
    for key, value in probe.items():
        cfg.PROBE[key] = value
    return cfg


def method():
    torch.manual_seed(0)
    build = partial(ResNet, 18, width=1 / 16, bn_groups=2, head=mlp_head(8))
    return MoCo(build, dim=8, queue_size=16)


def train(online, steps=4):
    """A run of ``steps`` steps, evaluated after each one if there is ``online``; its end."""
    moco = method()
    take_step = TrainStep(moco, torch.optim.SGD(moco.encoder_q.parameters(), 0.1), total_steps=4)
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(steps):
        views = [torch.randint(256, (8, 3, 32, 32), generator=generator).byte() for _ in range(2)]
        take_step(views, torch.arange(8), step, 0.1)
        if online and online.due(step + 1):
            found.append(online.evaluate(moco)["knn_top1"])
    gradients = [p.grad for p in moco.encoder_q.parameters()]
    modes = [module.training for module in moco.modules()]
    return moco.state_dict(), take_step.state_dict(), torch.get_rng_state(), gradients, modes, found


def test_a_run_with_it_ends_bit_for_bit_as_a_run_without_it(tmp_path):
    write_classes(tmp_path / "all", 10)
    online = build_online_knn(
        config(tmp_path / "all", PERIOD_EPOCHS=1.0), num_images=8, total_steps=4
    )
    state, optimizer, rng, gradients, modes, found = train(online)
    expected = train(None)
    assert len(found) == 4
    assert all(torch.equal(state[name], value) for name, value in expected[0].items())
    assert optimizer["optimizer"]["state"].keys() == expected[1]["optimizer"]["state"].keys()
    assert torch.equal(rng, expected[2])
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected[3], strict=True))
    assert modes == expected[4]


def test_it_measures_what_the_probe_measures(tmp_path):
    write_classes(tmp_path / "all" / "train", 9)
    write_classes(tmp_path / "all" / "val", 6, seed=1)
    online = build_online_knn(config(tmp_path / "all"), num_images=27, total_steps=4)
    assert [step for step in range(9) if online.due(step)] == [4]  # no period: at the end only
    moco = method()
    moco(2 * [torch.randint(256, (8, 3, 32, 32)).byte()], 0, torch.arange(8))  # moves BN
    seen, unseen = open_train_and_test(str(tmp_path / "all/train"), str(tmp_path / "all/val"))
    moco.encoder_q.eval()
    bank, tests = (extract(moco.encoder_q, x, online.preprocessing) for x in (seen, unseen))
    named = weighted_knn(bank.values, bank.labels, tests.values, num_classes=3)
    expected = 100 * (named[:, 0] == tests.labels).double().mean().item()
    assert online.evaluate(moco.train()) == {"knn_top1": pytest.approx(expected)}
    assert 0 < expected <= 100


def test_a_run_shows_it_in_its_lines_its_record_and_tensorboard(tmp_path, capsys):
    data = write_classes(tmp_path / "all", 10)  # 30 images, an epoch of 3.75 steps
    words = ("PROBE.DATA", str(data), "PROBE.PERIOD_EPOCHS", "0.5", "LOG.PERIOD", "1")
    train_run(tiny.recipe("moco-v2", data, tmp_path / "run", *words))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iter")]
    records = list(map(json.loads, (tmp_path / "run" / "metrics.json").open()))
    found = {r["iteration"]: r["knn_top1"] for r in records if "knn_top1" in r}
    assert list(found) == [2, 4, 6]
    for line in said:
        step = int(line.split()[1].split("/")[0])
        shown = re.findall(r"kNN (\S+)%", line)
        assert shown == ([f"{found[step]:.1f}"] if step in found else [])
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    curve = {event.step: event.value for event in events.Scalars("knn_top1")}
    assert curve == pytest.approx(found)
    assert set(events.Tags()["scalars"]) == set().union(*records) - {"iteration"}


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1.0, [4, 7, 10, 12]), (0.5, [2, 4, 5, 7, 9, 10, 12])]
)
def test_it_is_due_when_an_epoch_is_full_and_at_the_end(tmp_path, epochs, steps):
    write_classes(tmp_path / "all", 2)
    cfg = config(tmp_path / "all", PERIOD_EPOCHS=epochs)
    online = build_online_knn(cfg, num_images=26, total_steps=12)  # an epoch: 3.25 steps of 8
    assert [step for step in range(20) if online.due(step)] == steps


def test_without_data_there_is_none_and_mistakes_are_named(tmp_path):
    assert build_online_knn(config(""), num_images=8, total_steps=4) is None
    with pytest.raises(UserError, match="nowhere"):
        build_online_knn(config(tmp_path / "nowhere"), num_images=8, total_steps=4)
    write_classes(tmp_path / "all", 2)
    with pytest.raises(UserError, match="PROBE.PERIOD_EPOCHS is -1"):
        build_online_knn(config(tmp_path / "all", PERIOD_EPOCHS=-1.0), num_images=8, total_steps=4)


def evaluate_on_rank(folder, ranks_differ):
    torch.set_num_threads(1)
    online = build_online_knn(config(folder), num_images=8, total_steps=4)
    moco = method()
    if ranks_differ:  # each rank has BN statistics of its own until they are saved
        for name, buffer in moco.encoder_q.named_buffers():
            if name.endswith("running_mean"):
                buffer += 2.0 * (2 * comm.rank() - 1)
    before = {name: value.clone() for name, value in moco.state_dict().items()}
    found = online.evaluate(moco)["knn_top1"]
    same = all(torch.equal(before[name], value) for name, value in moco.state_dict().items())
    return found, same


def test_two_ranks_share_the_images_and_find_what_one_finds(tmp_path):
    """An odd number of images, one of them unreadable, and BN statistics whose mean is one's."""
    alike = {"amber": (120, 144, 168), "blue": (168, 120, 144), "green": (144, 168, 120)}
    folder = write_classes(tmp_path / "all", 33, colours=alike)
    (folder / "blue" / "05.jpg").write_bytes(b"nothing")
    alone, _ = evaluate_on_rank(folder, ranks_differ=False)
    assert 40 < alone < 99  # neither chance nor certainty: any difference would show
    for found, same in on_ranks(2, evaluate_on_rank, folder, True):
        assert found == pytest.approx(alone)
        assert same
