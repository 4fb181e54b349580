"""Memory of all loader processes, for a million listed images and a hundred million in shards.

    python benchmarks/loader.py [--images 1000000] [--workers 0 2 8]

Each case runs in a fresh interpreter: it opens the source, starts the workers, and sums the
proportional set sizes (Pss) of all its processes, once after some batches and again after five
times as many from a distant epoch. The figure reported is the difference from the same run on a few
images, which excludes the cost of torch and the interpreters. The peer is the usual Python list of
paths, which each worker gradually copies by touching the reference counts. Linux only.
"""

import argparse
import io
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image

from pretrain.data.loader import build_batches
from pretrain.data.shards import ShardSource
from pretrain.data.source_base import Source
from pretrain.data.sources import open_source
from pretrain.data.transforms.recipes import view_recipes

FILES = 16
SHARD = 1000  # images per shard
DETOUR = b"./" * 12  # pads the paths to the length of ImageNet's


class ListOfPaths(Source):
    """The peer: a list of paths, as in torchvision's ImageFolder."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.samples = [(path, number % 1000) for number, path in enumerate(paths)]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> bytes:
        path, _ = self.samples[index]
        return Path(path).read_bytes()

    def name(self, index: int) -> str:
        return self.samples[index][0]


class SimulatedShards(ShardSource):
    """Shards that all contain the same image; their order and counts are real."""

    def __init__(self, shards: int, image: bytes) -> None:
        urls = [f"/data/pretrain/{number:06}.tar" for number in range(shards)]
        super().__init__(urls, np.full(shards, SHARD), np.zeros((0, 2), np.int64))
        self.image = image

    def read(self, index: int) -> bytes:
        self._locate(index)
        return self.image


def open_case(kind: str, images: int, folder: Path) -> Source:
    if kind == "shards":
        return SimulatedShards(images // SHARD, (folder / "0.png").read_bytes())
    if kind == "python list":
        return ListOfPaths(
            [os.fsdecode(bytes(folder) + b"/" + DETOUR) + f"{i % FILES}.png" for i in range(images)]
        )
    listed = folder / "list.txt"
    with listed.open("wb") as file:
        file.writelines(DETOUR + b"%d.png\n" % (i % FILES) for i in range(images))
    return open_source(str(listed))


def run_case(
    connection: multiprocessing.connection.Connection,
    case: tuple[str, int, int],
    folder: Path,
) -> None:
    """Send the bytes in use after some batches, and after many more."""
    kind, images, workers = case
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # on few cores
    torch.set_num_threads(1)
    source = open_case(kind, images, folder)
    held = []
    for start, steps in ((0, 40), (10**9 // 64, 200)):
        batches = build_batches(
            source,
            view_recipes("moco-v1", crop_size=8),
            batch_size=64,
            seed=0,
            start_step=start,
            stop_step=10**12,
            num_workers=workers,
        )
        for _ in range(steps):
            next(batches)
        pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        assert len(pids) == 1 + workers
        held.append(sum(proportional_set_size(pid) for pid in pids))
        batches.close()
    connection.send(held)


def proportional_set_size(pid: int | None) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/smaps_rollup has no Pss")


def measure(case: tuple[str, int, int], folder: Path) -> list[int]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=run_case, args=(sender, case, folder))
    process.start()
    sender.close()
    held = receiver.recv()
    process.join()
    return held


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10**6, help="listed images (1000000)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 2, 8], help="numbers of workers (0 2 8)"
    )
    args = parser.parse_args(argv)
    most = max(args.workers)
    cases = [("list file", args.images, workers) for workers in args.workers]
    cases += [("shards", 100 * args.images, most), ("python list", args.images, most)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(FILES):
            stream = io.BytesIO()
            Image.new("RGB", (16, 16), (i, i, i)).save(stream, "PNG")
            (folder / f"{i}.png").write_bytes(stream.getvalue())
        bare = {workers: measure(("list file", FILES, workers), folder) for workers in args.workers}
        print("MB more than the same run on 16 images, after 40 batches and after 200 more:")
        result = 0.0
        for kind, images, workers in cases:
            held = measure((kind, images, workers), folder)
            first, then = (a - b for a, b in zip(held, bare[workers], strict=True))
            print(
                f"{kind:12s} {images:11,d} images, {workers} workers: {first / 1e6:7.1f}"
                f" {then / 1e6:7.1f}  ({max(first, then) / images:.2f} bytes per image;"
                f" all processes {held[1] / 1e6:.0f} MB)",
                flush=True,
            )
            if (kind, workers) == ("list file", most):
                result = max(first, then) / images
    print(f"ratio loader_bytes_per_image {result:.1f}")


if __name__ == "__main__":
    main()
