#!/usr/bin/env python3
"""List the runs below a folder: kind, state, weights, seed, score, iterations, time."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (handles a Ctrl-C during the imports)

from moco_common.errors import run_tool
from moco_common.files import check_exists

EPILOG = "example: tools/runs.py runs --filter kind=fine-tuning --filter state=done --sort -score"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="moco-runs", description=__doc__, epilog=EPILOG)
    add = result.add_argument
    add("folder", metavar="DIR", type=Path, help="folder that holds run directories, at any depth")
    what = "column to sort by (default: run), descending with a minus: --sort=-score"
    add("--sort", default="run", metavar="NAME", help=what)
    what = "only runs whose column NAME contains TEXT; can be repeated"
    add("--filter", action="append", default=[], metavar="NAME=TEXT", help=what)
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--quiet", action="store_true", help="print warnings and errors only")
    return result


def work(args: argparse.Namespace) -> None:
    check_exists(args.folder, "pass a folder that holds run directories")
    from moco_det.report.list_runs import arrange, as_json, as_table, list_runs

    rows = arrange(list_runs(args.folder), args.filter, args.sort)
    if not args.quiet:
        print(as_json(rows) if args.json else as_table(rows))


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(lambda: work(args), "stopped: start again", also=(OSError,))


if __name__ == "__main__":
    sys.exit(main())
