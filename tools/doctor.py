#!/usr/bin/env python3
"""Check this machine: is everything installed that the tools need, and how fast is it?"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (handles a Ctrl-C during the imports)

from moco_common.errors import UserError, run_tool


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="moco-doctor", description=__doc__)
    add = result.add_argument
    what = "folder in which runs will be written (default: .)"
    add("--output-dir", default=".", metavar="DIR", help=what)
    add("--report", action="store_true", help="print everything in Markdown, for a bug report")
    add("--quiet", action="store_true", help="print only what is not ok")
    add("--gpu", action="store_true", help="run what needs a GPU; write gpu.md and gpu.json to DIR")
    minutes = "time for --gpu, most important parts first (default: 8)"
    add("--minutes", type=float, default=8.0, metavar="M", help=minutes)
    add("--tiny", action="store_true", help="--gpu at the smallest size, which a CPU can run")
    return result


def check_gpu(args: argparse.Namespace) -> int:
    import torch

    from pretrain.gpu_check.kit import check

    if args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes:g} leaves no time: give a number above 0.")
    if not torch.cuda.is_available() and not args.tiny:
        raise UserError("torch sees no GPU here: add --tiny to try the check on the CPU.")
    folder = Path(args.output_dir).resolve()
    return 0 if check(folder, minutes=args.minutes, tiny=args.tiny) else 1


def work(args: argparse.Namespace) -> int:
    if args.gpu:
        return check_gpu(args)
    from pretrain.doctor.machine import FAILURE, WARNING
    from pretrain.doctor.report import examine, report

    marks = {"ok": "ok  ", WARNING: "warn", FAILURE: "FAIL"}
    findings = []
    for finding in examine(Path(args.output_dir).resolve()):
        findings.append(finding)
        if args.report or (args.quiet and finding.state == "ok"):
            continue
        print(f"{marks[finding.state]}  {finding.what:<22} {finding.found}", flush=True)
        if finding.advice:
            print(f"      {'':<22} {finding.advice}")
    if args.report:
        print(report(findings))
    return 1 if any(finding.state == FAILURE for finding in findings) else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(lambda: work(args), "stopped")


if __name__ == "__main__":
    sys.exit(main())
