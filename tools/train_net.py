#!/usr/bin/env python3
"""Fine-tune and evaluate a detector by a named protocol."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (handles a Ctrl-C during the imports)

from moco_common.errors import UserError, run_tool

EPILOG = """examples:
  train_net.py --config VOC --output-dir runs/voc-moco MODEL.WEIGHTS moco.pkl
  train_net.py --config VOC-random --train-data voc:DATA:trainval --test-data voc:DATA:test \\
      --output-dir runs/own-random SOLVER.IMS_PER_BATCH 4 MODEL.ARCHITECTURE_FROM moco.pkl
  train_net.py --eval-only --output-dir runs/voc-moco
  train_net.py --config VOC --explain SOLVER.IMS_PER_BATCH 4
"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser("moco-train-net", description=__doc__, epilog=EPILOG)
    result.formatter_class = argparse.RawDescriptionHelpFormatter
    add = result.add_argument
    add("--config", metavar="NAME|FILE", help="protocol (VOC, COCO-FPN-1x, ...) or YAML file")
    specs = "{voc,coco,yolo}:DIR:SPLIT, coco:JSON:IMAGES, semseg:IMAGES:LABELS, a Detectron2 name"
    add("--train-data", nargs="+", default=(), metavar="SPEC", help=specs)
    add("--test-data", metavar="SPEC", help="data to evaluate on, as for --train-data")
    ranks = "number of processes: one per GPU, or N on the CPU (default: 1; not with torchrun)"
    add("--num-gpus", type=int, default=1, metavar="N", help=ranks)
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS or the run's checkpoint")
    add("--resume", action="store_true", help="resume from the run's newest checkpoint")
    add("--trials", type=int, metavar="N", help="number of runs, with seeds SEED, SEED + 1, ...")
    add("--trial", type=int, metavar="K", help="index of the one trial to run, in DIR/trial_K")
    add("--strict", action="store_true", help="treat every problem in own data as an error")
    what = "print the resolved run, its source and deviations (or everything about KEY), and exit"
    add("--explain", nargs="?", const="", metavar="KEY", help=what)
    what = "run the most expensive batch, report the memory it needs, and exit"
    add("--preflight", action="store_true", help=what)
    add("--check-images", action="store_true", help="decode all images before anything else")
    add("--log", action="append", choices=("wandb", "mlflow"), help="experiment tracker as well")
    add("--quiet", action="store_true", help="print warnings and errors only")
    add("--output-dir", metavar="DIR", help="run directory (default: OUTPUT_DIR of the config)")
    add("overrides", nargs="*", metavar="KEY VALUE", help="config keys and their values")
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args = parser().parse_intermixed_args(argv)
    for at, word in enumerate(args.train_data):
        if word.isupper() and ":" not in word:  # the first KEY VALUE after the last SPEC
            args.overrides = [*args.train_data[at:], *args.overrides]
            args.train_data = args.train_data[:at]
            break
    if args.explain and len(args.overrides) % 2:  # --explain KEY VALUE: an override, not a KEY
        args.overrides, args.explain = [args.explain, *args.overrides], ""
    args.overrides += ["PREFLIGHT", "only"] if args.preflight else []
    args.overrides += ["TRACKERS", str(args.log)] if args.log else []
    del args.preflight, args.log
    return args


def work(args: argparse.Namespace) -> int | None:
    from moco_det.config.defaults import check_keys
    from moco_det.config.protocols import check_request

    if args.explain:
        check_keys([args.explain], where="the command line")
    elif not args.config and not args.output_dir:
        raise UserError("name a protocol or a file with --config, such as --config VOC.")
    check_request(args.config, args.overrides)
    from moco_det.engine.explain import explain
    from moco_det.engine.setup import Options
    from moco_det.engine.train_net import train_net

    options = Options(**vars(args))
    return explain(options) if args.explain is not None else train_net(options)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    again = "stopped: run the same command again, with --resume if there is a checkpoint"
    return run_tool(lambda: work(args), again)


if __name__ == "__main__":
    sys.exit(main())
