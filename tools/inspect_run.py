#!/usr/bin/env python3
"""Inspect a pre-training run: curves, filters, neighbours, views, geometry of the keys."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (handles a Ctrl-C during the imports)

from moco_common.errors import run_tool
from moco_common.files import check_exists
from moco_common.hardware import cpu_count
from moco_common.progress import silent

EPILOG = """examples:
  inspect_run.py runs/moco                                # the images it was trained on
  inspect_run.py runs/moco/checkpoint_last.pth --data photos/val -o inspection
  inspect_run.py runs/moco --no-images                    # if the images are not available
"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="moco-inspect",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("run", metavar="RUN_DIR", help="run directory, or a checkpoint in one")
    add("--data", nargs="+", default=(), metavar="SPEC", help="images (default: those of the run)")
    add("--no-images", action="store_true", help="leave out what needs images")
    add("--images", type=int, default=1000, metavar="N", help="number of images (default: 1000)")
    what = "number of images shown with their neighbours (default: 8)"
    add("--queries", type=int, default=8, metavar="N", help=what)
    add("-k", type=int, default=8, metavar="K", help="number of neighbours (default: 8)")
    what = "side of the crop in pixels (default: that of the run)"
    add("--crop-size", type=int, metavar="PX", help=what)
    workers, what = min(8, cpu_count()), "number of processes that decode images"
    add("--workers", type=int, default=workers, metavar="N", help=f"{what} (default: {workers})")
    what = "seed of the random choice of images (default: 0)"
    add("--seed", type=int, default=0, metavar="N", help=what)
    add("--quiet", action="store_true", help="print warnings and errors only")
    what = "output folder (default: inspection/ in the run directory)"
    add("-o", "--output", type=Path, metavar="DIR", help=what)
    return result


def work(args: dict[str, Any]) -> None:
    log = silent if args.pop("quiet") else print
    check_exists(args["run"], "pass the --output-dir of a pre-training run")
    from pretrain.inspection.inspect_run import Settings, inspect_run

    result = inspect_run(Settings(**args | {"data": tuple(args["data"])}), log)
    log(f"{result['text']}\nwritten to {result['folder']}: index.html shows everything on one page")


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    stopped = "stopped: start again; features that were extracted in full are kept"
    return run_tool(lambda: work(args), stopped)


if __name__ == "__main__":
    sys.exit(main())
