"""Convert the ResNet of any checkpoint for Detectron2 or torchvision: see `--help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (a Ctrl-C during the imports)

from moco_common.errors import UserError, run_tool
from moco_det.conversion import convert


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="moco-convert",
        description="Convert the ResNet of any checkpoint, whatever project wrote it, into weights "
        "for Detectron2 or torchvision, and prove that both networks compute the same.",
    )
    add = arguments.add_argument
    add("checkpoint", type=Path, help="PyTorch, pickle or safetensors file")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=".pkl, .pth or .safetensors (default: CHECKPOINT.pkl, CHECKPOINT_torchvision.pth)",
    )
    add("--to", choices=("detectron2", "torchvision"), default="detectron2")
    add("--source", metavar="NAME", help="the project, if the file does not tell")
    add("--prefix", metavar="P", help="prefix of the encoder's tensors, if the file does not tell")
    add("--encoder", metavar="NAME", help="which of several encoders (query, key, student, ...)")
    add("--drop", metavar="PATTERN", action="append", default=[], help="tensors to leave out")
    add("--stride-in-1x1", action=argparse.BooleanOptionalAction, help="as in MSRA's weights")
    add("--pixel-mean", nargs=3, type=float, metavar="X", help="of 0 to 255 (default: ImageNet's)")
    add("--pixel-std", nargs=3, type=float, metavar="X")
    add("--format", choices=("RGB", "BGR"), help="order of the channels (default RGB)")
    what = "give every convolution the norm of a fresh one; the output stays the same"
    add("--rescale", action="store_true", help=what)
    add("--no-proof", action="store_true", help="write without comparing the two networks")
    add("--verbose", action="store_true", help="a line for every tensor of the file")
    add("--quiet", action="store_true", help="print warnings and errors only")
    return arguments


def work(arguments: argparse.Namespace) -> None:
    checkpoint, to = arguments.checkpoint, arguments.to
    suffix = ".pkl" if to == "detectron2" else "_torchvision.pth"
    output = arguments.output or checkpoint.with_name(checkpoint.stem + suffix)
    if output.resolve() == checkpoint.resolve():
        raise UserError(f"{output} is the checkpoint itself: name another file with -o.")
    converted = convert(
        checkpoint,
        to,
        output=output,
        source=arguments.source,
        prefix=arguments.prefix,
        encoder=arguments.encoder,
        drop=arguments.drop,
        stride_in_1x1=arguments.stride_in_1x1,
        pixel_mean=arguments.pixel_mean,
        pixel_std=arguments.pixel_std,
        pixel_format=arguments.format,
        rescale=arguments.rescale,
        proof=not arguments.no_proof,
    )
    if arguments.quiet:
        for warning in converted.report.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return
    if arguments.verbose:
        print(converted.report.table())
    print(converted.report)
    print(f"written       {output}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return run_tool(lambda: work(arguments), "stopped: start again", also=(OSError,))


if __name__ == "__main__":
    sys.exit(main())
