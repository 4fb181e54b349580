"""Communication of shuffling BN: bytes and time, compared with an all-gather of float batches.

    python benchmarks/shuffle.py [--batch 32] [--size 224] [--repeats 9]

Both permute the images of all ranks by the same random order, over gloo on this machine. Ours sends
each rank the uint8 images it is to encode. The peer, as the shuffle is usually written, gathers the
normalised float images of all ranks on every rank and selects from them. The results are compared
first. The bytes are counted from the tensors and split sizes passed to the collectives, and printed
with the values of the formulas.
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
from pretrain.modeling.resnet import Normalize

WORLDS, TIMED = (2, 4, 8), (2, 4)
PERMUTATIONS = 5  # averaged over, as the number of images that change ranks varies


class ReceivedBytes(TorchDispatchMode):
    """A dispatch mode that counts the bytes this rank receives from the others."""

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
    """Return this rank's rows of the permuted global batch, (n, 3, H, W) float: the peer."""
    parts = [torch.empty_like(images) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, images)
    mine = permutation.view(dist.get_world_size(), -1)[dist.get_rank()]
    return torch.cat(parts)[mine]


def work(folder: str, batch: int, size: int, repeats: int) -> None:
    """Compare, count and time on one rank; write the results to a file."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(rank)
    shape = (batch, 3, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    floats = Normalize()(images)
    order = torch.Generator().manual_seed(0)  # the same on every rank
    permutations = [torch.randperm(world * batch, generator=order) for _ in range(PERMUTATIONS)]
    ours: Callable[[Tensor], Tensor] = lambda p: permute_batch(images, p)  # noqa: E731
    theirs: Callable[[Tensor], Tensor] = lambda p: gather_and_pick(floats, p)  # noqa: E731
    assert torch.equal(Normalize()(ours(permutations[0])), theirs(permutations[0]))

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
    parser.add_argument("--batch", type=int, default=32, help="images per rank (32)")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels (224)")
    parser.add_argument("--repeats", type=int, default=9, help="timed repetitions (9)")
    args = parser.parse_args(argv)
    one = args.batch * 3 * args.size**2  # bytes of one rank's uint8 batch
    print(f"{args.batch} images of {args.size} px per rank: {one / 1e6:.2f} MB as uint8")
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
            f"{world} ranks, received per rank: ours {ours / 1e6:8.2f} MB "
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
