#!/usr/bin/env python
"""Fine-tune and evaluate a detector by a named protocol."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (a Ctrl-C during the imports)

import moco_det  # noqa: F401 (a Ctrl-C during the imports)
from moco_common.errors import run_tool

EPILOG = """examples:
  train_net.py --config VOC --output-dir runs/voc-moco MODEL.WEIGHTS moco.pkl
  train_net.py --config VOC-random --train-data voc:DATA:trainval --test-data voc:DATA:test \\
      --output-dir runs/own-random SOLVER.IMS_PER_BATCH 4 MODEL.ARCHITECTURE_FROM moco.pkl
  train_net.py --eval-only --output-dir runs/voc-moco
  train_net.py --config VOC --explain SOLVER.IMS_PER_BATCH 4
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", metavar="NAME|FILE", help="protocol (VOC, COCO-FPN-1x, ...) or YAML file")
    specs = "voc:DIR:SPLIT, coco:JSON:IMAGES, semseg:IMAGES:LABELS, or a name of Detectron2's"
    add("--train-data", nargs="+", default=(), metavar="SPEC", help=specs)
    add("--test-data", metavar="SPEC", help="the same, for evaluation")
    ranks = "processes: one a GPU, or N on the CPU (default 1; not with torchrun)"
    add("--num-gpus", type=int, default=1, metavar="N", help=ranks)
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS or the run's checkpoint")
    add("--resume", action="store_true", help="go on from the run's newest checkpoint")
    add("--trials", type=int, metavar="N", help="N runs, seeds SEED, SEED + 1, ...")
    add("--trial", type=int, metavar="K", help="run K of them alone (from 0), into DIR/trial_K")
    add("--strict", action="store_true", help="anything wrong in own data is an error")
    what = "print what would be run, from which source, deviating how (or all about KEY), and stop"
    add("--explain", nargs="?", const="", metavar="KEY", help=what)
    add("--preflight", action="store_true", help="try the worst batch, say what fits, and stop")
    add("--quiet", action="store_true", help="print warnings and errors only")
    add("--output-dir", metavar="DIR", help="run directory (default: OUTPUT_DIR of the config)")
    add("overrides", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    for at, word in enumerate(args.train_data):
        if word.isupper() and ":" not in word:  # the first KEY VALUE after the last SPEC
            args.overrides = [*args.train_data[at:], *args.overrides]
            args.train_data = args.train_data[:at]
            break
    if args.explain and len(args.overrides) % 2:  # --explain KEY VALUE: an override, not a KEY
        args.overrides = [args.explain, *args.overrides]
        args.explain = ""
    args.overrides += ["PREFLIGHT", "only"] if args.preflight else []
    del args.preflight
    return args


def work(args: argparse.Namespace) -> int | None:
    from moco_det.engine.explain import explain
    from moco_det.engine.setup import Options
    from moco_det.engine.train_net import train_net

    options = Options(**vars(args))
    return explain(options) if args.explain is not None else train_net(options)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_tool(lambda: work(args), interrupted="interrupted: go on with --resume")


if __name__ == "__main__":
    sys.exit(main())
