#!/usr/bin/env python3
"""Walk the whole road on generated scenes: pre-train, convert, fine-tune, evaluate, report."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (handles a Ctrl-C during the imports)

from moco_common.errors import run_tool


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="moco-demo", description=__doc__)
    add = result.add_argument
    what = "folder of all results; with a seed, DIR-seedN (default: runs/demo)"
    add("-o", "--output-dir", type=Path, default=Path("runs/demo"), metavar="DIR", help=what)
    what = "seed of the scenes, the weights and the order of the images (default: 0)"
    add("--seed", type=int, default=0, metavar="N", help=what)
    add("--quiet", action="store_true", help="print warnings and errors only")
    return result


def work(args: argparse.Namespace) -> None:
    from moco_det.demo.walk import Demo

    output_dir = args.output_dir if args.seed == 0 else Path(f"{args.output_dir}-seed{args.seed}")
    Demo(output_dir, Path(__file__).resolve().parent, args.seed, quiet=args.quiet).run()


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(lambda: work(args), "stopped: run the same command again to continue")


if __name__ == "__main__":
    sys.exit(main())
