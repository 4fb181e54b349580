#!/usr/bin/env python3
"""Look at this machine: is everything here that the road needs, and how fast is it?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (a Ctrl-C during the imports)

from moco_common.errors import run_tool
from pretrain.doctor.machine import FAILURE, WARNING
from pretrain.doctor.report import examine, report

MARKS = {"ok": "ok  ", WARNING: "warn", FAILURE: "FAIL"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moco-doctor", description=__doc__)
    parser.add_argument(
        "--output-dir", default=".", metavar="DIR", help="where runs will be written (default: .)"
    )
    parser.add_argument(
        "--report", action="store_true", help="print everything in Markdown, for a bug report"
    )
    parser.add_argument("--quiet", action="store_true", help="print only what is not ok")
    args = parser.parse_args(argv)

    def work() -> int:
        findings = []
        for finding in examine(Path(args.output_dir).resolve()):
            findings.append(finding)
            if args.report or (args.quiet and finding.state == "ok"):
                continue
            print(f"{MARKS[finding.state]}  {finding.what:<22} {finding.found}", flush=True)
            if finding.advice:
                print(f"      {'':<22} {finding.advice}")
        if args.report:
            print(report(findings))
        return 1 if any(finding.state == FAILURE for finding in findings) else 0

    return run_tool(work, "stopped")


if __name__ == "__main__":
    sys.exit(main())
