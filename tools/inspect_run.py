#!/usr/bin/env python3
"""Look into a pre-training run: curves, filters, neighbours, views, the geometry of its keys."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (a Ctrl-C during the imports)

from moco_common.errors import run_tool
from moco_common.hardware import cpu_count
from moco_common.progress import silent
from pretrain.inspection import Settings, inspect_run

EPILOG = """examples:
  inspect_run.py runs/moco                                # what it was trained on
  inspect_run.py runs/moco/checkpoint_last.pth --data photos/val -o seen
  inspect_run.py runs/moco --no-images                    # where the images are not at hand
"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="moco-inspect",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("run", metavar="RUN_DIR", help="a run directory, or a checkpoint in one")
    add("--data", nargs="+", default=(), metavar="SPEC", help="images (those of the run)")
    add("--no-images", action="store_true", help="leave out what needs images")
    add("--images", type=int, default=1000, metavar="N", help="how many to look at (1000)")
    add("--queries", type=int, default=8, metavar="N", help="images shown with neighbours (8)")
    add("-k", type=int, default=8, help="neighbours (8)")
    add("--crop-size", type=int, metavar="PX", help="(that of the run)")
    add("--workers", type=int, default=min(8, cpu_count()), help="decoding images")
    add("--seed", type=int, default=0, help="of the draw of images")
    add("--quiet", action="store_true", help="print warnings and errors only")
    add("-o", "--output", type=Path, metavar="DIR", help="(inspection/ in the run directory)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    say = silent if args.pop("quiet") else print

    def work() -> None:
        settings = Settings(**args | {"data": tuple(args["data"])})
        seen = inspect_run(settings, say)
        say(f"{seen['text']}\nwritten to {seen['folder']}: index.html is all of it on one page")

    return run_tool(work, "stopped: start again; features of all images, once there, are kept")


if __name__ == "__main__":
    sys.exit(main())
