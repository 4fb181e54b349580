#!/usr/bin/env python3
"""Measure a frozen backbone: weighted kNN and linear classification, without fine-tuning."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (handles a Ctrl-C during the imports)

from moco_common.errors import run_tool
from moco_common.files import check_exists, make_folder
from moco_common.hardware import cpu_count, rank
from moco_common.progress import silent

EPILOG = """examples:
  probe.py runs/moco-v2/checkpoint_last.pth --train imagenet/train --test imagenet/val --linear
  probe.py runs/own/checkpoint_last.pth --train photos --holdout 0.2 --quick
  probe.py random --config runs/own/config.yaml --train photos     # the baseline
  probe.py other.pth --train photos --linear --lr 30    # the paper's rate, on all images
"""


def parser() -> argparse.ArgumentParser:
    from pretrain.probe.defaults import SWEEP, TEMPERATURE, K

    result = argparse.ArgumentParser("moco-probe", description=__doc__, epilog=EPILOG)
    result.formatter_class = argparse.RawDescriptionHelpFormatter
    add = result.add_argument
    add("checkpoint", help="own checkpoint, one with torchvision's names, or the word random")
    add("--train", required=True, metavar="DIR", help="training images, one folder per class")
    add("--test", metavar="DIR", help="test images (default: a share of --train is held out)")
    add("--holdout", type=float, default=0.2, metavar="SHARE", help="held-out share (default: 0.2)")
    add("--quick", action="store_true", help="fit a logistic regression on stored features")
    add("--linear", action="store_true", help="train the paper's linear classifier, 100 epochs")
    add("--lr", nargs="+", type=float, default=SWEEP, help="rates to try (default: 0.1 to 30)")
    add("--epochs", type=float, default=100, help="length of --linear (default: 100)")
    add("-k", type=int, default=K, help=f"number of neighbours (default: {K})")
    what = f"temperature of the neighbours' votes (default: {TEMPERATURE})"
    add("--temperature", type=float, default=TEMPERATURE, help=what)
    add("--crop-size", type=int, metavar="PX", help="crop (default: as pre-trained, else 224)")
    add("--resize", type=int, metavar="PX", help="short side before the crop (default: 8/7 of it)")
    add("--fit-bn", action=argparse.BooleanOptionalAction, help="refit BN statistics on --train")
    add("--config", metavar="NAME|FILE", help="recipe with the network of random weights")
    add("--features", type=Path, metavar="DIR", help="feature folder (default: by the report)")
    add("--no-cache", action="store_true", help="store no features")
    add("--batch-size", type=int, default=256, help="images per batch (default: 256)")
    add("--workers", type=int, default=min(8, cpu_count()), help="processes that decode images")
    add("--seed", type=int, default=0, help="seed of holdout, weights, classifiers (default: 0)")
    add("--quiet", action="store_true", help="print warnings only")
    add("-o", "--output", type=Path, metavar="FILE", help="report (CHECKPOINT_probe.json)")
    add("overrides", nargs="*", metavar="KEY VALUE", help="keys of --config and their values")
    return result


def work(argv: Sequence[str] | None) -> None:
    args = vars(parser().parse_intermixed_args(argv))
    if rank() > 0:
        return  # under torchrun: one process does it all
    output, features, no_cache = (args.pop(name) for name in ("output", "features", "no_cache"))
    config, overrides, linear = (args.pop(name) for name in ("config", "overrides", "linear"))
    log, rates, epochs = silent if args.pop("quiet") else print, args.pop("lr"), args.pop("epochs")
    output = output or Path(f"{Path(args['checkpoint']).with_suffix('')}_probe.json")
    cache = None if no_cache else features or output.with_name(f"{output.stem}_features")
    from pretrain.config.defaults import load_config

    cfg = load_config(config, overrides) if config else None
    if args["checkpoint"] != "random":
        check_exists(args["checkpoint"], "name a checkpoint, or `random`")
    for folder in filter(None, (args["train"], args["test"])):
        check_exists(folder)
    make_folder(output.parent, "-o")
    from pretrain.probe.linear import LinearProtocol
    from pretrain.probe.run import Settings, probe, summary, write

    protocol = LinearProtocol(rates, epochs, args["batch_size"]) if linear else None
    result = probe(Settings(**args, cache=cache, linear=protocol), cfg, log)
    write(result, output)
    log(f"{summary(result)}\n\nwritten to {output}")


def main(argv: Sequence[str] | None = None) -> int:
    stopped = "stopped: start again; features that were extracted in full are kept"
    return run_tool(lambda: work(argv), stopped)


if __name__ == "__main__":
    sys.exit(main())
