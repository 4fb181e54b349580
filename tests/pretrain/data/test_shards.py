import json
import os
import shutil
import signal
import sys
import tarfile
import threading
import time
import tracemalloc
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from moco_common.errors import UserError
from pretrain.data import shards
from pretrain.data.loader import build_batches
from pretrain.data.shard_index import read_samples
from pretrain.data.shards import ShardSource
from pretrain.data.sources import open_source
from pretrain.data.transforms.recipes import view_recipes

COUNTS = (30, 11, 40, 1, 25, 33, 17)
IMAGES = sum(COUNTS)
RECIPES = view_recipes("moco-v1", crop_size=8)


def png(number: int) -> bytes:
    stream = BytesIO()
    Image.new("RGB", (9, 8), (number, 255 - number, 99)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Seven shards of 157 samples, each an image and its metadata, numbered through."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    number = 0
    for shard, count in enumerate(COUNTS):
        with webdataset.TarWriter(str(tmp_path / "data" / f"{shard:03}.tar")) as writer:
            for _ in range(count):
                sample = {"__key__": f"{number:06}", "json": {"n": number}, "png": png(number)}
                writer.write(sample)
                number += 1
    return tmp_path / "data"


@pytest.fixture(params=["one window", "lanes"])
def buffer(request, monkeypatch):
    """The whole of it in the buffer, or lanes and windows as in a source too large for that."""
    if request.param == "lanes":
        monkeypatch.setattr(shards, "LANES", 4)
        monkeypatch.setattr(shards, "WINDOW", 7)


def on_disk(folder):
    return open_source(f"shards:{folder}/{{000..006}}.tar")


def piped(folder):
    return open_source(f"shards:pipe:cat {folder}/{{000..006}}.tar")


def streamed(folder):
    """Without a process for each shard."""
    source = on_disk(folder)
    return ShardSource(source.urls, source.counts)


def batches(source, stop_step=30, batch_size=8, **options):
    return list(
        build_batches(
            source, RECIPES, batch_size=batch_size, seed=3, stop_step=stop_step, **options
        )
    )


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def test_images_are_those_that_webdataset_gives(folder):
    source = on_disk(folder)
    theirs = webdataset.WebDataset(f"{folder}/{{000..006}}.tar", shardshuffle=False)
    assert [source.read(i) for i in range(len(source))] == [sample["png"] for sample in theirs]
    assert source.name(45) == f"{folder}/002.tar#4"
    with pytest.raises(IndexError):
        source.read(IMAGES)


@pytest.mark.parametrize("batch_size", [1, 8, 12, 13, 200])
def test_an_epoch_shows_every_image_once_whatever_the_batch(folder, buffer, batch_size):
    source = on_disk(folder)
    images = source.order(np.arange(5 * IMAGES), batch_size, 7).reshape(5, IMAGES)
    assert (np.sort(images, axis=1) == np.arange(IMAGES)).all()
    assert len({tuple(epoch) for epoch in images.tolist()}) == 5
    assert (images != source.order(np.arange(5 * IMAGES), batch_size, 8).reshape(5, -1)).any()


def test_a_stream_gives_the_images_of_the_order_on_any_number_of_ranks(folder, buffer):
    source, stream = on_disk(folder), streamed(folder)
    steps = range(5, 5 + 2 * IMAGES // 8)  # from the middle of an epoch on, into the third
    expected = [
        source.read(int(i)) for i in source.order(np.arange(5 * 8, steps.stop * 8), 8, seed=7)
    ]
    for world in (1, 2, 8):
        share = 8 // world
        ranks = [
            stream.stream(iter([8 * step + r * share + np.arange(share) for step in steps]), 8, 7)
            for r in range(world)
        ]
        together = [image for parts in zip(*ranks, strict=True) for part in parts for image in part]
        assert together == expected


def test_ranks_of_a_stream_read_no_shard_but_their_own(folder, monkeypatch):
    monkeypatch.setattr(shards, "LANES", 4)
    monkeypatch.setattr(shards, "WINDOW", 4)
    opened = []
    read = shards.read_samples
    monkeypatch.setattr(shards, "read_samples", lambda url: opened.append(url) or read(url))
    stream = streamed(folder)
    for rank in range(4):
        whole_epoch = [8 * s + 2 * rank + np.arange(2) for s in range(IMAGES // 8)]
        list(stream.stream(iter(whole_epoch), 8, 7))
    assert len(opened) <= len(COUNTS) + 3  # at most two lanes meet in a shard


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_disk_and_stream_workers_and_resumption_give_the_same_batches(folder, buffer):
    expected = batches(on_disk(folder))
    assert_equal(batches(piped(folder), 4), expected[:4])
    assert_equal(batches(streamed(folder)), expected)
    assert_equal(batches(streamed(folder), num_workers=3, start_step=13), expected[13:])
    assert_equal(batches(on_disk(folder), num_workers=1), expected)
    assert_equal(batches(on_disk(folder), start_step=13), expected[13:])


def test_ranks_share_the_batch_of_one(folder, buffer):
    for source in (on_disk(folder), streamed(folder)):
        ranks = [batches(source, 6, rank=r, world_size=4) for r in range(4)]
        for whole, *parts in zip(batches(source, 6), *ranks, strict=True):
            assert torch.equal(whole.index, torch.cat([part.index for part in parts]))
            for i, view in enumerate(whole.views):
                assert torch.equal(view, torch.cat([part.views[i] for part in parts]))


def test_neighbours_come_from_all_over_a_large_source():
    source = ShardSource([f"{i}.tar" for i in range(200)], np.full(200, 1000))
    images = source.order(np.arange(40_000, 40_000 + 50 * 256), 256, 0)
    shard = images.reshape(50, 256) // 1000
    assert min(len(set(batch)) for batch in shard.tolist()) >= 0.9 * shards.LANES
    in_shard = images.reshape(50, 256) % 1000  # no batch is all beginnings, or all ends
    assert in_shard.std(1).min() > 150


def test_a_hundred_million_images_cost_what_their_shards_cost():
    tracemalloc.start()
    source = ShardSource([f"{i}.tar" for i in range(100_000)], np.full(100_000, 1000))
    images = [source.order(10**8 + 256 * s + np.arange(256), 256, 0) for s in range(3)]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 10**8
    assert len(np.unique(images)) == 3 * 256
    assert size < 20e6  # 0.2 bytes an image


def test_a_sample_is_what_shares_a_name_and_its_first_image_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = ["a/1.txt", "a/1.JPG", "a/1.seg.png", "a/1.webp", "a/2.cls", "b/1.jpeg", "b/3", "c.png"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, BytesIO(name.encode()))
    expected = [b"a/1.JPG", b"b/1.jpeg", b"c.png"]
    source = open_source(f"shards:{tmp_path}/x.tar")
    assert [source.read(i) for i in range(len(source))] == expected
    (images,) = open_source(f"shards:pipe:cat {tmp_path}/x.tar").stream(iter([np.arange(3)]), 3, 0)
    assert sorted(images) == expected


@pytest.mark.parametrize("opener", [on_disk, piped])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_damaged_shard_has_lost_is_skipped_and_named(folder, opener, num_workers):
    cut = folder / "002.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (folder / "005.tar").write_bytes(b"<html>404</html>" * 999)
    source = opener(folder)
    left = cut.read_bytes().count(b"\x89PNG")
    assert left < 25
    assert abs(len(source) - (IMAGES - 33 - 40 + left)) <= 2
    steps = -(-len(source) // 8)
    got = batches(source, steps, num_workers=num_workers, max_bad_share=0.2)
    shown = Counter(int(i) for batch in got for i in batch.index)
    assert len(shown) >= len(source) - 2
    reasons = {name.rpartition("/")[2].partition("#")[0]: r for b in got for name, r in b.skipped}
    assert set(reasons) <= {"002.tar", "005.tar"}
    assert "005.tar" in reasons
    assert all("damaged or cut off" in reason for reason in reasons.values())


def test_a_shard_cut_off_after_it_was_indexed_is_an_error_by_name_not_a_wrong_image(folder):
    for source in (on_disk(folder), piped(folder)):
        whole = (folder / "004.tar").read_bytes()
        (folder / "004.tar").write_bytes(whole[: len(whole) // 2])
        got = batches(source, IMAGES // 8, max_bad_share=0.2)
        skipped = [pair for batch in got for pair in batch.skipped]
        assert 8 <= len(set(skipped)) <= 18
        assert all("004.tar#" in name and "cut off" in reason for name, reason in skipped)
        (folder / "004.tar").write_bytes(whole)


def test_a_command_that_fails_ends_the_run_with_its_reason(folder):
    source = piped(folder)
    source.urls = [url.replace("cat", "false") for url in source.urls]
    with pytest.raises(UserError, match=r"could not be read.*false .*damaged or cut off"):
        batches(source, 2)


def test_an_error_of_the_reading_thread_is_raised_in_the_run(folder, monkeypatch):
    source = piped(folder)
    monkeypatch.setattr(source, "_plan", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(source.stream(iter([np.arange(2)]), 2, 0))


def test_the_index_is_made_once_and_again_when_a_shard_changes(folder, monkeypatch):
    assert len(on_disk(folder)) == IMAGES
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # not needed again
        assert on_disk(folder).read(3) == png(3)
    (folder / "000.tar").write_bytes((folder / "001.tar").read_bytes())
    assert len(on_disk(folder)) == IMAGES - 30 + 11


def test_an_index_that_cannot_be_kept_beside_the_shards_is_kept_in_the_cache(folder, tmp_path):
    folder.chmod(0o555)
    try:
        assert len(on_disk(folder)) == IMAGES
    finally:
        folder.chmod(0o755)
    kept = [*folder.glob(".images-*"), *(tmp_path / "cache").rglob(".images-*")]
    assert len(kept) == 1  # root may write anywhere


def test_streams_are_counted_once_or_trusted_to_their_sizes_json(folder, monkeypatch):
    assert piped(folder).counts.tolist() == list(COUNTS)
    monkeypatch.setattr("pretrain.data.shard_index._count", None)
    assert piped(folder).counts.tolist() == list(COUNTS)  # from the cache
    sizes = {f"{i:03}.tar.gz": 10 + i for i in range(2)}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    for name in sizes:
        (folder / name).write_bytes(b"")
    source = open_source(f"shards:{folder}/{{000..001}}.tar.gz")
    assert source.streamed
    assert source.counts.tolist() == [10, 11]


def flaky(folder, tmp_path, bytes_first, status, times=1):
    """A source whose third shard breaks off ``times`` times, after so many bytes."""
    script = tmp_path / "read"
    script.write_text(
        f"""#!/bin/sh
if [ $(basename $1) != 002.tar ] || [ $(wc -l < {tmp_path}/attempts) -ge {times} ]; then
    exec cat $1
fi
echo once more >> {tmp_path}/attempts
head -c {bytes_first} $1
exit {status}
"""
    )
    script.chmod(0o755)
    (tmp_path / "attempts").touch()
    return f"shards:pipe:{script} {folder}/{{000..006}}.tar"


def between_members(folder):
    with tarfile.open(folder / "002.tar") as tar:
        return tar.getmembers()[10].offset


@pytest.mark.parametrize("cut", ["nothing", "inside an image", "between two files"])
@pytest.mark.parametrize("status", [0, 18])
def test_a_connection_that_breaks_off_while_counting_is_tried_again(
    folder, tmp_path, monkeypatch, cut, status
):
    if cut == "between two files" and not status:
        pytest.skip("a shorter file, as far as anybody can tell")
    monkeypatch.setattr("pretrain.data.shard_index.PAUSES", (0, 0, 0))
    boundary = between_members(folder)
    size = {"nothing": 0, "inside an image": boundary + 600, "between two files": boundary}[cut]
    spec = flaky(folder, tmp_path, size, status)
    assert open_source(spec).counts.tolist() == list(COUNTS)
    assert (tmp_path / "attempts").read_text().count("\n") == 1
    (cached,) = (tmp_path / "cache").rglob("counts-*")
    assert list(json.loads(cached.read_text()).values()) == list(COUNTS)


def test_a_connection_that_always_breaks_off_is_an_error_and_no_count(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("pretrain.data.shard_index.PAUSES", (0, 0.01, 0.02))
    spec = flaky(folder, tmp_path, 20_000, 18, times=4)
    with pytest.raises(UserError, match=r"shard pipe:\S+read \S+002\.tar could not .*exit 18"):
        open_source(spec)
    assert (tmp_path / "attempts").read_text().count("\n") == 4
    (cached,) = (tmp_path / "cache").rglob("counts-*")
    assert list(json.loads(cached.read_text()).values()) == list(COUNTS[:2])
    assert open_source(spec).counts.tolist() == list(COUNTS)  # once it holds


def test_the_count_of_a_damaged_shard_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr("pretrain.data.shard_index.PAUSES", (0, 0, 0))
    shard = folder / "002.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert piped(folder).counts[2] < COUNTS[2]
    shard.write_bytes(whole)
    assert piped(folder).counts.tolist() == list(COUNTS)


@pytest.mark.skipif(not shutil.which("curl"), reason="webdataset reads http by curl")
def test_a_server_that_drops_the_connection_is_asked_again(folder, monkeypatch):
    monkeypatch.setattr("pretrain.data.shard_index.PAUSES", (0, 0, 0))
    asked = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = os.path.basename(self.path)
            if not name.endswith(".tar"):
                self.send_error(404)
                return
            data = (folder / name).read_bytes()
            asked[name] += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if name != "001.tar" or asked[name] > 1 else data[:5000])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"shards:http://127.0.0.1:{server.server_port}/{{000..003}}.tar"
        assert open_source(url).counts.tolist() == list(COUNTS[:4])
        assert asked == {"000.tar": 1, "001.tar": 2, "002.tar": 1, "003.tar": 1}
        server.shutdown()


def test_several_urls_are_one_source(folder):
    source = open_source([f"shards:{folder}/003.tar", f"shards:file:{folder}/{{001..002}}.tar"])
    assert len(source) == 1 + 11 + 40
    assert source.read(0) == png(81)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["shards:{folder}/{{006..009}}.tar"], r"3 of 4 shards do not exist.*007\.tar"),
        (["shards:{folder}/000.tar", "{folder}"], "cannot be mixed"),
        (["shards:{folder}/empty.tar"], "contains no images"),
    ],
)
def test_wrong_shards_are_one_clear_error(folder, specs, message):
    tarfile.open(folder / "empty.tar", "w").close()
    with pytest.raises(UserError, match=message):
        open_source([spec.format(folder=folder) for spec in specs])


def test_the_index_can_be_made_beforehand_by_a_command(folder, capsys):
    assert shards.main([f"shards:{folder}/{{000..006}}.tar"]) == 0
    assert capsys.readouterr().out == "157 images in 7 shards\n"
    assert shards.main([f"shards:{folder}/{{006..007}}.tar"]) == 1
    assert "error: 1 of 2 shards do not exist" in capsys.readouterr().err


def test_without_webdataset_the_error_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match=r"pip install 'moco-det\[shards\]'"):
        on_disk(folder)


def test_a_command_is_let_go_early_even_if_a_forked_worker_holds_its_pipe(tmp_path):
    """More than a pipe holds, so that the command cannot end by itself."""
    with webdataset.TarWriter(str(tmp_path / "big.tar")) as writer:
        for n in range(8):
            writer.write({"__key__": f"{n}", "jpg": bytes(100_000)})
    samples = read_samples(f"pipe:cat {tmp_path / 'big.tar'}")
    next(samples)
    worker = os.fork()
    if not worker:
        time.sleep(600)
        os._exit(0)
    try:
        closing = threading.Thread(target=samples.close, daemon=True)
        closing.start()
        closing.join(20)
        assert not closing.is_alive()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, BytesIO(data))


def both_ways(path, count):
    """The images of a shard, read in place and streamed; they must be the same."""
    source = open_source(f"shards:{path}")
    assert len(source) == count
    stream = open_source(f"shards:pipe:cat {path}")
    assert stream.counts.tolist() == [count]
    (streamed,) = stream.stream(iter([np.arange(count)]), count, 0)
    images = [source.read(i) for i in range(count)]
    assert sorted(streamed) == sorted(images)
    return images, source.notes, stream.notes


@pytest.mark.parametrize("number", [1, 16, 17, 40])
def test_names_with_dots_are_as_many_images_in_a_shard_as_in_a_folder(
    tmp_path, monkeypatch, number
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [(f"{i}.jpg", b"%d" % i) for i in range(8)]
    files += [(f"Screenshot at 10.11.{i:02}.jpg", b"s%d" % i) for i in range(number)]
    files += [(f"x.rf.{i}.jpg", b"x%d" % i) for i in range(3)]  # Roboflow's names
    (tmp_path / "folder").mkdir()
    for name, data in files:
        (tmp_path / "folder" / name).write_bytes(data)
    write_tar(tmp_path / "x.tar", files)
    images, *notes = both_ways(tmp_path / "x.tar", len(files))
    assert images == [data for _, data in files]
    assert notes == [(), ()]
    assert len(open_source(str(tmp_path / "folder"))) == len(files)


def test_further_images_of_a_sample_are_passed_over_and_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [
        ("a.depth.png", b"depth"),
        ("a.png", b"a"),
        ("a.seg.png", b"seg"),
        ("._a.png", b"a Mac's notes"),
        ("b.jpg", b"b"),
        ("c", png(3)),
        ("d.bin", png(4)),
        ("e.heic", b"x"),
        ("f.json", b"{}"),
    ]
    write_tar(tmp_path / "x.tar", files)
    images, note, other = both_ways(tmp_path / "x.tar", 4)
    assert images == [b"a", b"b", png(3), png(4)]
    assert "3 files passed over (2 .png, 1 .heic" in note[0]
    assert "3 files passed over (2 .png, 1 .heic" in other[0]


def binary(size):
    """A number in the binary notation of GNU tar, which may be negative or very large."""
    return (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)


def header(name, size, kind=b"0"):
    member = tarfile.TarInfo(name)
    member.type = kind
    buffer = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    buffer[124:136] = size
    checksum = sum(buffer[:148]) + 8 * 32 + sum(buffer[156:])
    buffer[148:156] = b"%06o\0 " % checksum
    return bytes(buffer)


@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"S", b"5", b"Z"])
@pytest.mark.parametrize("size", [-512, -1024, -(2**40), -1, 2**37, 2**62, 2**80])
def test_a_size_that_is_negative_or_absurd_ends_the_shard(tmp_path, monkeypatch, kind, size):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pretrain.data.shard_index.PAUSES", (0, 0, 0))
    write_tar(tmp_path / "x.tar", [("a.jpg", b"a"), ("b.jpg", b"b")])
    good = (tmp_path / "x.tar").read_bytes()[:2048]
    evil = header("c.jpg", binary(size), kind)
    (tmp_path / "x.tar").write_bytes(good + evil + good + bytes(1024))
    found = []

    def work():
        source = open_source(f"shards:{tmp_path}/x.tar")
        found.append((len(source), source.read(0), source.read(1)))
        for i in range(2, len(source)):
            with pytest.raises(OSError, match=r"cut off|limit"):
                source.read(i)
        found.append(open_source(f"shards:pipe:cat {tmp_path}/x.tar").counts.tolist())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert found == [(3, b"a", b"b"), [3]]


def test_an_image_above_the_limit_is_not_read_in_either_way(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pretrain.data.shard_index.MAX_BYTES", 9)
    monkeypatch.setattr(shards, "MAX_BYTES", 9)
    write_tar(tmp_path / "x.tar", [("a.jpg", b"123456789"), ("b.jpg", b"1234567890")])
    source = open_source(f"shards:{tmp_path}/x.tar")
    assert source.read(0) == b"123456789"
    with pytest.raises(OSError, match="10 bytes are more than the limit of 9"):
        source.read(1)
    stream = open_source(f"shards:pipe:cat {tmp_path}/x.tar")
    (images,) = stream.stream(iter([np.arange(2)]), 2, 0)
    assert set(images) == {"10 bytes are more than the limit of 9", b"123456789"}
