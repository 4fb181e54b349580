#!/usr/bin/env python3
"""Walk the whole road on generated scenes: pre-train, convert, fine-tune, evaluate, report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (a Ctrl-C during the imports)

from moco_common.errors import run_tool
from moco_det.demo.walk import Demo


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moco-demo", description=__doc__)
    parser.add_argument("-o", "--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    args = parser.parse_args(argv)
    output_dir = args.output_dir if args.seed == 0 else Path(f"{args.output_dir}-seed{args.seed}")
    demo = Demo(output_dir, Path(__file__).resolve().parent, args.seed, quiet=args.quiet)
    return run_tool(demo.run, "stopped: the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
