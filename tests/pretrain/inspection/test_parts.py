"""The rooms of `pretrain.inspection` one by one: what is drawn, named, dated, said, escaped."""

import html
import io
import re
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from moco_common.backbone.resnet import GROWN
from moco_common.errors import UserError
from moco_common.html_page import render_page
from pretrain.checkpoint import format as checkpoint
from pretrain.data.sources import open_source
from pretrain.engine.train_loop import train
from pretrain.inspection import dictionary, findings
from pretrain.inspection.dictionary import dictionary_of, judge_prototypes
from pretrain.inspection.geometry import measure
from pretrain.inspection.inspect_run import Settings, inspect_run
from pretrain.inspection.neighbours import class_names, sample_images
from pretrain.inspection.run_directory import open_run
from tests.pretrain import tiny
from tests.pretrain.probe_data import write_classes


def remembered(name, step, *overrides, **buffers):
    """What a method of batch 8 keeps after ``step`` steps, were its buffers these."""
    method, _ = tiny.build(name, *overrides)
    for buffer, value in buffers.items():
        setattr(method, buffer, value)
    return dictionary_of(method, step, 8)


def units(n, d=6, seed=0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def test_a_sample_is_a_draw_of_images_each_with_the_folder_that_it_lies_in(tmp_path):
    source = open_source([str(write_classes(tmp_path / "all", 8))])
    sample = sample_images(source, 9, seed=4)
    names = [sample.name(i) for i in range(len(sample))]
    assert len(set(names)) == 9
    assert names == sorted(names)
    assert class_names(sample) == [Path(name).parent.name for name in names]
    assert len(set(class_names(sample))) > 1
    assert names != [sample_images(source, 9, seed=5).name(i) for i in range(9)]
    assert len(sample_images(source, 99, seed=4)) == 24


def test_of_a_stream_the_first_images_are_held(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(6):
            data = cv2.imencode(".png", np.full((9, 9, 3), 40 * i, np.uint8))[1].tobytes()
            member = tarfile.TarInfo(f"{i:03}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_source([f"shards:pipe:cat {tmp_path}/0.tar"])
    assert source.streamed  # as a file on a disk is not
    sample = sample_images(source, 4, seed=0)
    assert len(sample) == 4
    assert class_names(sample) is None
    shades = [cv2.imdecode(np.frombuffer(sample.read(i), np.uint8), 1)[0, 0, 0] for i in range(4)]
    names = [sample.name(i) for i in range(4)]
    assert names == [f"pipe:cat {tmp_path}/0.tar#{shade // 40}" for shade in shades]
    assert len(set(names)) == 4


def test_the_embeddings_queue_counts_what_was_written_and_how_old_it_is():
    queue = torch.zeros(2, 20, 6)
    queue[:, :16] = units(32).view(2, 16, 6)  # two steps of eight, the newest first
    found = remembered("swav", 2, queue=queue)
    memory = found.memory
    assert (memory.kind, memory.size, memory.filled) == ("queue of embeddings", 20, 16)
    assert found.age == 2
    assert found.geometry == measure(queue[:, :16].reshape(32, 6))
    assert any("not full yet (16 of 20)" in text for text in found.findings())
    queue[:, 16:] = units(8, seed=1).view(2, 4, 6)
    found = remembered("swav", 50, queue=queue)
    assert (found.memory.filled, found.age, found.turned) == (20, 3, None)
    assert not any("not full" in text for text in found.findings())
    assert remembered("swav", 50, queue=torch.zeros(2, 0, 6)) is None
    assert remembered("byol", 50) is None


def test_keys_of_an_encoder_that_has_moved_on_are_told():
    state = {"queue": units(80), "queue_ptr": torch.tensor([0])}
    found = remembered("moco", 30, "MOCO.MOMENTUM", 0.7, **state)
    assert (found.memory.pointer, found.age) == (0, 10)  # eighty keys, eight a step
    assert found.turned == pytest.approx(1 - 0.7**10)
    assert any("raise MOCO.MOMENTUM" in text for text in found.findings())
    quiet = remembered("moco", 30, "MOCO.MOMENTUM", 0.99, **state)
    assert not any("MOCO.MOMENTUM" in text for text in quiet.findings())


def test_of_a_long_queue_a_draw_is_measured(monkeypatch):
    monkeypatch.setattr(dictionary, "MOST", 50)
    one = units(1).expand(400, 6)
    state = {"queue": torch.cat([one, -one]), "queue_ptr": torch.tensor([0])}
    found = remembered("moco", 1000, **state)
    assert (found.memory.size, found.memory.filled, found.geometry.count) == (800, 800, 50)
    assert abs(found.geometry.mean_cosine) < 0.3  # of both halves, and not of the first fifty


@pytest.mark.parametrize(
    ("used", "perplexity", "word"),
    [(1, 1.0, "collapsed"), (9, 0.9, "collapsed"), (9, 5.0, "few clusters"), (40, 30.0, "in use")],
)
def test_prototypes_are_judged_by_how_many_take_the_images(used, perplexity, word):
    use = {"prototypes": 80, "used": used, "perplexity": perplexity}
    text = judge_prototypes(use, 60, "Do this.")
    assert word in text
    assert ("Do this." in text) == (word == "collapsed")


def test_the_page_escapes_whatever_it_is_given_and_loads_nothing(tmp_path):
    evil = "<script>alert('\"x\"')</script> & co"
    picture = tmp_path / "p.png"
    picture.write_bytes(b"\x89PNG not really")
    template = Path(findings.__file__).with_name("inspection.html.j2")
    page = render_page(
        template, title=evil, lines={evil: evil}, findings=[evil], pictures={evil: picture}
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 7  # title and heading, finding, row twice, caption twice
    assert " & co" not in page
    assert html.unescape(re.search(r'alt="([^"]*)"', page)[1]) == evil
    assert re.findall(r'(?:src|href)="(\S{5})', page) == ["data:"]
    assert "default-src 'none'" in page


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    data = write_classes(tmp_path_factory.mktemp("data") / "all", 6)
    out = tmp_path_factory.mktemp("run")
    train(tiny.recipe("simclr", data, out, "PROBE.DATA", str(data)), quiet=True)
    return out


def test_building_the_method_draws_no_number_and_leaves_it_as_it_is_used(a_run):
    run = open_run(a_run)
    before = torch.get_rng_state()
    method = run.build()
    assert torch.equal(before, torch.get_rng_state())
    assert not any(module.training for module in method.modules())
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, run.state["state_dict"][name]), name


def test_the_report_says_knn_growth_and_projections_as_they_are(a_run, tmp_path):
    seen = inspect_run(Settings(str(a_run), tmp_path / "seen", queries=2, k=2), say=lambda _: None)
    (knn,) = (r["knn_top1"] for r in open_run(a_run).records if "knn_top1" in r)
    assert f"kNN {knn:.1f} % (best {knn:.1f} %)" in seen["text"]
    run = open_run(a_run)
    method = run.build()
    sample = torch.from_numpy(np.load(tmp_path / "seen/features/sample.npy"))
    with torch.no_grad():
        expected = measure(method.encoder_q.fc(sample))
    assert seen["geometry"]["projections"]["mean_cosine"] == pytest.approx(
        expected.mean_cosine, rel=1e-4
    )
    assert not any("grown" in text for text in seen["findings"])

    state = checkpoint.load(a_run / checkpoint.LAST)
    state["state_dict"]["encoder_q.layer2.0.conv2.weight"] *= 2 * GROWN
    checkpoint.save(state, tmp_path / "grown")
    seen = inspect_run(Settings(str(tmp_path / "grown"), no_images=True), say=lambda _: None)
    assert seen["largest_growth"]["layer"] == "layer2.0.conv2.weight"
    assert any("layer2.0.conv2.weight has grown to" in text for text in seen["findings"])


def test_too_few_images_to_look_at_is_one_sentence(a_run, tmp_path):
    one = write_classes(tmp_path / "one", 1, colours={"blue": (9, 9, 9)})
    settings = Settings(str(a_run), tmp_path / "seen", data=(str(one),))
    with pytest.raises(UserError, match="too few"):
        inspect_run(settings, say=lambda _: None)
