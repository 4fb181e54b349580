#!/usr/bin/env python3
"""Export the detector of a fine-tuning run to ONNX or TorchScript: see `--help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (handles a Ctrl-C during the imports)

from moco_common.errors import UserError, run_tool
from moco_common.files import check_exists, check_output, protecting

FORMATS = (".onnx", ".pt")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="moco-export",
        description="Export the detector of a fine-tuning run to a file that runs without "
        "Detectron2. The file is written only if it finds what the detector finds.",
    )
    add = result.add_argument
    add("images", nargs="*", metavar="IMAGE", help="images to compare on (default: drawn scenes)")
    add("--run", required=True, metavar="RUN_DIR", help="directory of a fine-tuning run")
    what = ".onnx, or .pt for TorchScript"
    add("-o", "--output", required=True, metavar="FILE", type=Path, help=what)
    what = "lowest score in the output (default: 0.05)"
    add("--threshold", type=float, default=0.05, metavar="SCORE", help=what)
    add("--quiet", action="store_true", help="print warnings and errors only")
    return result


def work(args: argparse.Namespace) -> None:
    if args.output.suffix not in FORMATS:
        raise UserError(f"{args.output} should end in {' or '.join(FORMATS)}, which is the format.")
    for path in (*args.images, args.run):
        check_exists(path)
    with protecting([*args.images, *Path(args.run).glob("*")]):
        check_output(args.output)
    from moco_det.engine.console_log import silence_detectron2
    from moco_det.export.export_run import export_detector
    from moco_det.inference.predictor import load_image

    silence_detectron2()
    images = {path: load_image(path) for path in args.images}
    exported = export_detector(args.run, args.output, images=images, score_threshold=args.threshold)
    if not args.quiet:
        print(exported)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(lambda: work(args), "stopped: start again", also=(OSError,))


if __name__ == "__main__":
    sys.exit(main())
