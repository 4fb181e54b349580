#!/usr/bin/env python3
"""Convert the ResNet of any checkpoint for Detectron2 or torchvision: see `--help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (handles a Ctrl-C during the imports)

from moco_common.errors import run_tool
from moco_common.files import check_exists, check_output, protecting


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="moco-convert",
        description="Convert the ResNet of any checkpoint, whatever project wrote it, into weights "
        "for Detectron2 or torchvision, and prove that both networks compute the same.",
    )
    add = result.add_argument
    add("checkpoint", type=Path, help="PyTorch, pickle or safetensors file")
    name = ".pkl, .pth or .safetensors (default: CHECKPOINT.pkl, CHECKPOINT_torchvision.pth)"
    add("-o", "--output", type=Path, metavar="FILE", help=name)
    what = "library that loads the weights (default: detectron2)"
    add("--to", choices=("detectron2", "torchvision"), default="detectron2", help=what)
    add("--source", metavar="NAME", help="project that wrote the checkpoint (default: detected)")
    add("--prefix", metavar="P", help="prefix of the encoder's tensor names (default: detected)")
    add("--encoder", metavar="NAME", help="encoder to convert if there are several (query, ...)")
    what = "pattern of tensor names to leave out; can be repeated"
    add("--drop", metavar="PATTERN", action="append", default=[], help=what)
    what = "stride in the first convolution of a bottleneck, as in MSRA's weights"
    add("--stride-in-1x1", action=argparse.BooleanOptionalAction, help=what)
    what = "pixel mean of each channel, from 0 to 255 (default: ImageNet's)"
    add("--pixel-mean", nargs=3, type=float, metavar="X", help=what)
    what = "standard deviation of each channel (default: ImageNet's)"
    add("--pixel-std", nargs=3, type=float, metavar="X", help=what)
    add("--format", choices=("RGB", "BGR"), help="channel order (default: RGB)")
    what = "rescale every convolution to the norm of a new one; the output stays the same"
    add("--rescale", action="store_true", help=what)
    add("--no-proof", action="store_true", help="write without comparing the two networks")
    add("--verbose", action="store_true", help="print one line for every tensor of the file")
    add("--quiet", action="store_true", help="print warnings and errors only")
    return result


def work(args: argparse.Namespace) -> None:
    checkpoint, to = args.checkpoint, args.to
    suffix = ".pkl" if to == "detectron2" else "_torchvision.pth"
    output = args.output or checkpoint.with_name(checkpoint.stem + suffix)
    check_exists(checkpoint)
    with protecting([checkpoint]):
        check_output(output)
    from moco_det.conversion import convert

    converted = convert(
        checkpoint,
        to,
        output=output,
        source=args.source,
        prefix=args.prefix,
        encoder=args.encoder,
        drop=args.drop,
        stride_in_1x1=args.stride_in_1x1,
        pixel_mean=args.pixel_mean,
        pixel_std=args.pixel_std,
        pixel_format=args.format,
        rescale=args.rescale,
        proof=not args.no_proof,
    )
    if args.quiet:
        for warning in converted.report.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return
    if args.verbose:
        print(converted.report.table())
    print(converted.report)
    print(f"written       {output}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(lambda: work(args), "stopped: start again", also=(OSError,))


if __name__ == "__main__":
    sys.exit(main())
