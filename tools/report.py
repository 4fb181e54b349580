#!/usr/bin/env python3
"""Tables, statistics and curves of finished runs, in one page: see `--help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (handles a Ctrl-C during the imports)

from moco_common.errors import run_tool
from moco_common.files import check_exists, protecting


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="moco-report",
        description="Print one table of finished runs (mean and spread over the seeds, published "
        "numbers of the same protocol, differences with Welch's interval) and write report.md, "
        "report.json and report.html. Where the runs kept their predictions, these also hold "
        "precision-recall curves, AP by size, confusions, and the best and worst images. Runs "
        "whose directories differ in the seed or trial only (out/moco-seed0, out/moco-seed1, "
        "out/moco/trial_0) are one group.",
    )
    add = arguments.add_argument
    what = "run directory, or a directory that holds trial_K"
    add("runs", nargs="+", metavar="RUN_DIR", help=what)
    what = "folder of the report"
    add("-o", "--output-dir", required=True, metavar="DIR", type=Path, help=what)
    what = "number of images of each kind (best, worst, most different) to show with the runs' "
    what += "detections (default: 4)"
    add("--pictures", type=int, default=4, metavar="N", help=what)
    add("--quiet", action="store_true", help="print warnings and errors only")
    return arguments


def work(arguments: argparse.Namespace) -> None:
    for run in arguments.runs:
        check_exists(run, "pass run directories")
    from moco_det.report.build import build_report
    from moco_det.report.runs import input_files, read_runs

    runs = read_runs(arguments.runs)
    with protecting(input_files(runs)):
        report = build_report(runs, arguments.output_dir, arguments.pictures)
        page = report.write(arguments.output_dir)
    if arguments.quiet:
        for note in report.notes:
            print(f"warning: {note}", file=sys.stderr)
        return
    print(report.summary())
    print(f"written: {page} (one page with everything), report.md, report.json")


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parser().parse_args(argv)
    return run_tool(lambda: work(arguments), "stopped: start again", also=(OSError,)) or None


if __name__ == "__main__":
    sys.exit(main())
