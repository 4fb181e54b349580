#!/usr/bin/env python3
"""Pre-train a ResNet on photographs by Momentum Contrast."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (a Ctrl-C during the imports)

from moco_common.errors import UserError, run_tool
from moco_common.launch import launch, restarted
from moco_common.stopping import Stopped
from pretrain.config.defaults import load_config, recipe_names, split_specs
from pretrain.engine.explain import explain_key, explain_run
from pretrain.engine.slurm import split_settings, submit
from pretrain.engine.train_loop import train
from pretrain.visualization.views import write_views


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="moco-pretrain",
        description=__doc__,
        epilog="example: tools/pretrain.py --config moco-v2 --data photos/ SOLVER.EPOCHS 100",
    )
    add = result.add_argument
    recipes = ", ".join(recipe_names())
    add("--config", default="", metavar="NAME|FILE", help=f"a recipe ({recipes}) or a YAML file")
    photographs = "photographs: a folder, a list file, coco:JSON:IMAGES, or shards:URL"
    add("--data", nargs="+", metavar="SPEC", help=photographs)
    add("--output-dir", help="where the run is written (runs/NAME of the recipe)")
    ranks = "processes on this machine: GPUs, or CPU processes where there are none"
    add("--num-gpus", type=int, default=1, metavar="N", help=ranks)
    job = "submit as a Slurm job that requeues itself: partition=gpu nodes=2 gpus_per_node=8 ..."
    add("--slurm", nargs="*", metavar="SETTING=VALUE", help=job)
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--quiet", action="store_true", help="print warnings and errors only")
    add("--profile", type=int, default=0, metavar="N", help="show where the time of N steps goes")
    add("--show-views", metavar="PNG", help="draw what the network would see, and end")
    what = "print the resolved recipe and its source (or all about KEY), and end"
    add("--explain", nargs="?", const="", metavar="KEY", help=what)
    add("overrides", nargs="*", metavar="KEY VALUE", help="configuration keys")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    if args.explain and len(args.overrides) % 2:  # --explain KEY VALUE: an override, not a KEY
        args.overrides, args.explain = [args.explain, *args.overrides], ""

    def work() -> int | None:
        if args.explain:
            print(explain_key(args.explain))
            return 0
        specs, trailing = split_specs(args.data or [])
        settings, after = split_settings(args.slurm or [])
        cfg = load_config(args.config, [*trailing, *after, *args.overrides])
        cfg.DATA = specs or cfg.DATA
        cfg.OUTPUT_DIR = args.output_dir or f"runs/{Path(args.config).stem}"
        if args.explain is not None:
            print(explain_run(args.config, cfg, [*trailing, *after, *args.overrides]))
        elif not cfg.DATA:
            raise UserError("--data is missing: name a folder of photographs.")
        elif args.show_views:
            print(write_views(cfg, args.show_views))
        elif args.slurm is not None:
            print(submit(cfg, settings, resume=args.resume, quiet=args.quiet))
        else:
            resume = args.resume or restarted()
            try:
                launch(train, args.num_gpus, cfg, resume, args.quiet, args.profile)
            except Stopped as stopped:
                return stopped.exit_status
        return 0

    return run_tool(work, "stopped: go on from the last checkpoint with --resume")


if __name__ == "__main__":
    sys.exit(main())
