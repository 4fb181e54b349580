#!/usr/bin/env python3
"""Draw what a trained detector finds in images: see `--help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (handles a Ctrl-C during the imports)

from moco_common.errors import run_tool
from moco_common.files import check_exists
from moco_common.text import counted


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="moco-predict",
        description="Draw boxes and masks, or the class of every pixel, on images and videos (or "
        "all in folders), and write predictions.json. The model: --run, or a config with weights.",
    )
    add = result.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image, video or folder")
    what = "folder of the pictures and predictions.json"
    add("-o", "--output-dir", required=True, metavar="DIR", type=Path, help=what)
    add("--run", metavar="RUN_DIR", help="directory of a fine-tuning run")
    add("--config", metavar="NAME|FILE", help="protocol or config file")
    add("--weights", metavar="FILE", help="checkpoint of a whole model")
    what = "lowest score to draw (default: 0.5; for label maps 0, which labels every pixel)"
    add("--threshold", type=float, metavar="SCORE", help=what)
    add("--quiet", action="store_true", help="print warnings and errors only")
    return result


def work(args: argparse.Namespace) -> int:
    for path in [*args.images, *filter(None, (args.run, args.weights))]:
        check_exists(path)
    from moco_det.config.protocols import check_request, load_config

    check_request(args.config, ())
    from tqdm import tqdm

    from moco_common.progress import follow, silent
    from moco_det.engine.console_log import silence_detectron2
    from moco_det.inference import predictor
    from moco_det.inference.predict_folder import predict
    from moco_det.inference.video import is_video

    silence_detectron2()
    failures = objects = pictures = 0
    images = predictor.find_images(args.images, silent if args.quiet else print)
    if args.run is not None:
        model = predictor.predictor_of_run(args.run, args.threshold)
    else:
        model = predictor.build_predictor(load_config(args.config), args.weights, args.threshold)
    total, found = predictor.count_pictures(images), predict(model, images, args.output_dir)
    for _, count, problem in follow(found, total, "predicting", args.quiet):
        objects += count or 0
        pictures += count is not None
        if problem is not None:
            failures += 1
            tqdm.write(f"error: {problem}", file=sys.stderr)
    labels = isinstance(model, predictor.Segmenter)
    what = counted(objects, "class area" if labels else "object")
    where = counted(pictures, "image")
    where += " and frames" if any(is_video(file) for file, _ in images) else ""
    unreadable = f"; {counted(failures, 'file')} unreadable" if failures else ""
    if not args.quiet:
        print(
            f"{what} in {where}: pictures and predictions.json are in {args.output_dir}{unreadable}"
        )
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int | None:
    parsing = parser()
    args = parsing.parse_args(argv)
    by_run = args.run is not None
    if by_run == (args.config is not None) or by_run == (args.weights is not None):
        parsing.error("give either --run RUN_DIR, or --config and --weights")
    stopped = f"stopped: start again; pictures drawn so far are in {args.output_dir}"
    return run_tool(lambda: work(args), stopped, also=(OSError,)) or None


if __name__ == "__main__":
    sys.exit(main())
