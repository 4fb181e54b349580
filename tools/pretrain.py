#!/usr/bin/env python3
"""Pre-train a ResNet on photographs by Momentum Contrast."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.config import load_config, recipe_names, split_specs
from pretrain.errors import UserError
from pretrain.launch import launch
from pretrain.train import train


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="moco-pretrain",
        description=__doc__,
        epilog="example: tools/pretrain.py --config moco-v2 --data photos/ SOLVER.EPOCHS 100",
    )
    result.add_argument(
        "--config", required=True, help=f"a recipe ({', '.join(recipe_names())}) or a YAML file"
    )
    result.add_argument(
        "--data",
        nargs="+",
        metavar="SPEC",
        help="photographs: a folder, a list file, or coco:JSON:IMAGES",
    )
    result.add_argument("--output-dir", help="where the run is written (runs/NAME of the recipe)")
    result.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine: GPUs, or CPU processes where there are none",
    )
    result.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    result.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="configuration keys")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    try:
        specs, trailing = split_specs(args.data or [])
        cfg = load_config(args.config, [*trailing, *args.overrides])
        cfg.DATA = specs or cfg.DATA
        cfg.OUTPUT_DIR = args.output_dir or f"runs/{Path(args.config).stem}"
        if not cfg.DATA:
            raise UserError("--data is missing: name a folder of photographs.")
        launch(train, args.num_gpus, cfg, args.resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: go on from the last checkpoint with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
