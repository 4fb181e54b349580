"""Shuffling BN: what each rank receives, ours beside the all-gather of whole float batches.

    python benchmarks/shuffle.py [--batch 32] [--size 224] [--repeats 9]

Both permute the images of all ranks by the same random order, on gloo processes of this machine.
Ours sends each rank the bytes of the images it is to encode; the peer, as the shuffle is usually
written, gathers every rank's normalised float images on every rank and picks from them. Results
are compared first. Bytes are counted on the way, from the tensors and split sizes that reach the
collectives, and set beside the formulas.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moco_common.launch import launch
from pretrain.distributed import permute_batch
from pretrain.modeling.resnet import normalize

WORLDS, TIMED = (2, 4, 8), (2, 4)
PERMUTATIONS = 5  # that bytes are counted over; how many images stay at home differs


class ReceivedBytes(TorchDispatchMode):
    """Counts what collectives bring to this rank from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function.namespace == "c10d":
            me, name = dist.get_rank(), function.overloadpacket.__name__
            if name == "alltoall_base_":
                output, _, _, received_rows = args[:4]
                away = sum(received_rows) - received_rows[me]
                self.count += away * output[0].numel() * output.element_size()
            elif name == "allgather_":
                for gathered in args[0]:
                    self.count += sum(
                        part.numel() * part.element_size()
                        for rank, part in enumerate(gathered)
                        if rank != me
                    )
            elif name != "barrier":
                raise NotImplementedError(name)
        return function(*args, **(kwargs or {}))


def gather_and_pick(images: Tensor, permutation: Tensor) -> Tensor:
    """The peer: (n, 3, H, W) float -> the same rows of the permuted global batch."""
    parts = [torch.empty_like(images) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, images)
    mine = permutation.view(dist.get_world_size(), -1)[dist.get_rank()]
    return torch.cat(parts)[mine]


def work(folder: str, batch: int, size: int, repeats: int) -> None:
    """On each rank: compare, count and time; each writes what it found."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(rank)
    shape = (batch, 3, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    floats = normalize(images)
    order = torch.Generator().manual_seed(0)  # the same on every rank
    permutations = [torch.randperm(world * batch, generator=order) for _ in range(PERMUTATIONS)]
    ours: Callable[[Tensor], Tensor] = lambda p: permute_batch(images, p)  # noqa: E731
    theirs: Callable[[Tensor], Tensor] = lambda p: gather_and_pick(floats, p)  # noqa: E731
    assert torch.equal(normalize(ours(permutations[0])), theirs(permutations[0]))

    found: dict[str, Any] = {}
    for name, shuffle in {"ours": ours, "all-gather": theirs}.items():
        with ReceivedBytes() as received:
            for permutation in permutations:
                shuffle(permutation)
        found[f"bytes of {name}"] = received.count / PERMUTATIONS
        found[f"ms of {name}"] = []
    for _ in range(repeats if world in TIMED else 0):
        for name, shuffle in {"ours": ours, "all-gather": theirs}.items():
            dist.barrier()
            start = time.perf_counter()
            shuffle(permutations[0])
            dist.barrier()
            found[f"ms of {name}"].append((time.perf_counter() - start) * 1e3)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="images a rank")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args(argv)
    one = args.batch * 3 * args.size**2  # bytes of one rank's uint8 batch
    print(f"{args.batch} images of {args.size} px a rank: {one / 1e6:.2f} MB as bytes")
    ratios = {}
    for world in WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            launch(work, world, folder, args.batch, args.size, args.repeats)
            ranks = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
        ours, theirs = (
            statistics.mean(rank[f"bytes of {name}"] for rank in ranks)
            for name in ("ours", "all-gather")
        )
        print(
            f"{world} ranks, received by each: ours {ours / 1e6:8.2f} MB "
            f"({ours / one:.3f} batches; (W-1)/W = {(world - 1) / world:.3f}), "
            f"all-gather {theirs / 1e6:8.2f} MB "
            f"({theirs / one / 4:.3f} float batches; W-1 = {world - 1})"
        )
        ratios[f"shuffle_bytes_w{world}"] = theirs / ours
        if world in TIMED:
            found = {name: ranks[0][f"ms of {name}"] for name in ("ours", "all-gather")}
            times = {name: statistics.median(values) for name, values in found.items()}
            spread = "; ".join(
                f"{name} {times[name]:.1f} ms ({min(values):.1f} to {max(values):.1f})"
                for name, values in found.items()
            )
            print(f"  over gloo, n = {args.repeats}: {spread}")
            ratios[f"shuffle_time_w{world}"] = times["all-gather"] / times["ours"]
    for name, value in ratios.items():
        print(f"ratio {name} {value:.1f}")


if __name__ == "__main__":
    main()
