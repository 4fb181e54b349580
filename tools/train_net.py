#!/usr/bin/env python
"""Fine-tune and evaluate a detector by a named protocol."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from moco_det.errors import UserError

EPILOG = """examples:
  train_net.py --config VOC --output-dir runs/voc-moco MODEL.WEIGHTS moco.pkl
  train_net.py --config VOC-random --train-data voc:DATA:trainval --test-data voc:DATA:test \\
      --output-dir runs/own-random SOLVER.IMS_PER_BATCH 4 MODEL.ARCHITECTURE_FROM moco.pkl
  train_net.py --eval-only --output-dir runs/voc-moco
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", metavar="NAME|FILE", help="protocol (VOC, COCO-FPN-1x, ...) or YAML file")
    add(
        "--train-data",
        nargs="+",
        default=(),
        metavar="SPEC",
        help="voc:DIR:SPLIT, coco:JSON:IMAGES, or a name that Detectron2 knows",
    )
    add("--test-data", metavar="SPEC", help="the same, for evaluation")
    add(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes: one a GPU, or N on the CPU (default 1; not with torchrun)",
    )
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS or the run's checkpoint")
    add("--resume", action="store_true", help="go on from the run's newest checkpoint")
    add("--trials", type=int, metavar="N", help="N runs, seeds SEED, SEED + 1, ...")
    add("--output-dir", metavar="DIR", help="run directory (default: OUTPUT_DIR of the config)")
    add("overrides", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    for at, word in enumerate(args.train_data):
        if word.isupper() and ":" not in word:  # the first KEY VALUE after the last SPEC
            args.overrides = [*args.train_data[at:], *args.overrides]
            args.train_data = args.train_data[:at]
            break
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        from moco_det.launch import Options, train_net

        train_net(Options(**vars(args)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: go on with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
