#!/usr/bin/env python3
"""Pre-train a ResNet on photographs by Momentum Contrast."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (handles a Ctrl-C during the imports)

from moco_common.errors import UserError, run_tool
from moco_common.files import check_exists

EXAMPLE = "example: tools/pretrain.py --config moco-v2 --data photos/ SOLVER.EPOCHS 100"
SPECS = "a folder, a .txt list, coco:JSON:IMAGES, video:FILE?every=N or shards:URL"


def parser() -> argparse.ArgumentParser:
    from pretrain.config.defaults import recipe_names

    result = argparse.ArgumentParser(prog="moco-pretrain", description=__doc__, epilog=EXAMPLE)
    add, recipes = result.add_argument, ", ".join(recipe_names())
    add("--config", default="", metavar="NAME|FILE", help=f"recipe ({recipes}) or YAML file")
    add("--data", nargs="+", metavar="SPEC", help=f"photographs: {SPECS}")
    add("--output-dir", metavar="DIR", help="run directory (default: runs/NAME of the recipe)")
    add("--num-gpus", type=int, default=1, metavar="N", help="processes, on GPUs if there are any")
    add("--slurm", nargs="*", metavar="K=V", help="submit a Slurm job: partition=gpu nodes=2 ...")
    add("--resume", action="store_true", help="resume from the last checkpoint")
    add("--quiet", action="store_true", help="print warnings and errors only")
    add("--profile", type=int, default=0, metavar="N", help="profile N steps")
    add("--show-views", metavar="PNG", help="draw the views that the network is given, and exit")
    add("--explain", nargs="?", const="", metavar="KEY", help="explain the run, or KEY, and exit")
    add("overrides", nargs="*", metavar="KEY VALUE", help="configuration keys and their values")
    return result


def work(argv: Sequence[str] | None) -> int:
    from pretrain.config.defaults import check_key, load_config, split_settings, split_specs

    args = parser().parse_intermixed_args(argv)
    if args.explain and len(args.overrides) % 2:  # --explain KEY VALUE: an override, not a KEY
        args.overrides, args.explain = [args.explain, *args.overrides], ""
    if args.explain:
        check_key(args.explain, "--explain")
        from pretrain.engine.explain import explain_key

        print(explain_key(args.explain))
        return 0
    specs, trailing = split_specs(args.data or [])
    settings, after = split_settings(args.slurm or [])
    overrides = [*trailing, *after, *args.overrides]
    cfg = load_config(args.config, overrides)
    cfg.DATA = specs or cfg.DATA
    cfg.OUTPUT_DIR = args.output_dir or f"runs/{Path(args.config).stem}"
    if args.explain is not None:
        from pretrain.engine.explain import explain_run

        print(explain_run(args.config, cfg, overrides))
        return 0
    if not cfg.DATA:
        raise UserError("--data is missing: name a folder of photographs.")
    if args.config == "continue" and not cfg.MODEL.WEIGHTS:
        raise UserError("--config continue starts from weights: add MODEL.WEIGHTS FILE.")
    for spec in cfg.DATA:
        check_exists(spec, f"give {SPECS}")
    if args.show_views:
        from pretrain.visualization.views import write_views

        print(write_views(cfg, args.show_views))
    elif args.slurm is not None:
        from pretrain.engine.slurm import submit

        print(submit(cfg, settings, resume=args.resume, quiet=args.quiet))
    else:
        from moco_common.launch import restarted
        from pretrain.engine.train_loop import start

        resume = args.resume or restarted()
        start(cfg, args.num_gpus, resume=resume, quiet=args.quiet, profile=args.profile)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(lambda: work(argv), "stopped: resume from the last checkpoint with --resume")


if __name__ == "__main__":
    sys.exit(main())
