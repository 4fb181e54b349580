#!/usr/bin/env python3
"""Measure a frozen backbone: weighted kNN and linear classification, without fine-tuning."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (a Ctrl-C during the imports)

from moco_common.errors import run_tool
from moco_common.hardware import cpu_count
from moco_common.progress import silent
from pretrain.config.defaults import load_config
from pretrain.probe.knn import TEMPERATURE, K
from pretrain.probe.linear import RATES, LinearProtocol
from pretrain.probe.run import Settings, probe, summary, write

EPILOG = """examples:
  probe.py runs/moco-v2/checkpoint_last.pth --train imagenet/train --test imagenet/val --linear
  probe.py runs/own/checkpoint_last.pth --train photos --holdout 0.2 --quick
  probe.py random --config runs/own/config.yaml --train photos     # the baseline
  probe.py other.pth --train photos --linear --lr 0.3 1 3 10 30    # a sweep, in one pass
"""


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(
        prog="moco-probe", description=__doc__, epilog=EPILOG, formatter_class=layout
    )
    add = result.add_argument
    add("checkpoint", help="ours, torchvision's names (tools/convert.py --to torchvision), random")
    add("--train", required=True, metavar="DIR", help="a folder of images for each class")
    add("--test", metavar="DIR", help="the same classes (default: hold out a share of --train)")
    add("--holdout", type=float, default=0.2, metavar="SHARE", help="of every class (0.2)")
    add("--quick", action="store_true", help="logistic regression on stored features, in seconds")
    add("--linear", action="store_true", help="the paper's protocol: 100 epochs of random crops")
    add("--lr", nargs="+", type=float, default=RATES, help="of --linear (30); several: a sweep")
    add("--epochs", type=float, default=100, help="of --linear (100)")
    add("-k", type=int, default=K, help=f"neighbours ({K})")
    add("--temperature", type=float, default=TEMPERATURE, help=f"of their votes ({TEMPERATURE})")
    add("--crop-size", type=int, metavar="PX", help="(that of the pre-training, else 224)")
    add("--resize", type=int, metavar="PX", help="short side before the crop (8/7 of it)")
    add("--fit-bn", action=argparse.BooleanOptionalAction, help="BN statistics of --train first")
    add("--config", metavar="NAME|FILE", help="recipe that gives random weights their network")
    add("--features", type=Path, metavar="DIR", help="where features are stored (by the report)")
    add("--no-cache", action="store_true", help="store no features")
    add("--batch-size", type=int, default=256, help="images at once, and of --linear (256)")
    add("--workers", type=int, default=min(8, cpu_count()), help="decoding images")
    add("--seed", type=int, default=0, help="of holdout, random weights and classifiers")
    add("--quiet", action="store_true", help="print warnings only")
    add("-o", "--output", type=Path, metavar="FILE", help="report (CHECKPOINT_probe.json)")
    add("overrides", nargs="*", metavar="KEY VALUE", help="of --config")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parser().parse_intermixed_args(argv))
    if os.environ.get("RANK", "0") != "0":
        return 0  # under torchrun: one process does it all
    output, features, no_cache = (args.pop(name) for name in ("output", "features", "no_cache"))
    config, overrides, linear = (args.pop(name) for name in ("config", "overrides", "linear"))
    say = silent if args.pop("quiet") else print
    protocol = LinearProtocol(args.pop("lr"), args.pop("epochs"), args["batch_size"])
    output = output or Path(f"{Path(args['checkpoint']).with_suffix('')}_probe.json")
    cache = None if no_cache else features or output.with_name(f"{output.stem}_features")

    def work() -> None:
        cfg = load_config(config, overrides) if config else None
        settings = Settings(**args, cache=cache, linear=protocol if linear else None)
        result = probe(settings, cfg, say)
        write(result, output)
        say(f"{summary(result)}\n\nwritten to {output}")

    return run_tool(work, "stopped: start again; features of a whole set, once there, are kept")


if __name__ == "__main__":
    sys.exit(main())
