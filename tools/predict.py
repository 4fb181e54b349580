"""Draw what a trained detector finds in images of one's own: see `--help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (a Ctrl-C during the imports)

from tqdm import tqdm

from moco_common.errors import run_tool
from moco_common.progress import follow
from moco_common.text import counted
from moco_det.config.protocols import load_config
from moco_det.engine.console_log import silence_detectron2
from moco_det.inference.predict_folder import predict
from moco_det.inference.predictor import (
    Segmenter,
    build_predictor,
    count_pictures,
    find_images,
    predictor_of_run,
)
from moco_det.inference.video import is_video


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="moco-predict",
        description="Draw boxes and masks, or the class of every pixel, on images and videos (or "
        "all in folders), and write predictions.json. The model: --run, or a config with weights.",
    )
    add = arguments.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image, video or folder")
    add("-o", "--output-dir", required=True, metavar="DIR", type=Path)
    add("--run", metavar="RUN_DIR", help="directory of a fine-tuning run")
    add("--config", metavar="NAME|FILE", help="protocol or config file")
    add("--weights", metavar="FILE", help="checkpoint of a whole model")
    add("--threshold", type=float, help="least score (default 0.5; of pixels 0: all are labelled)")
    add("--quiet", action="store_true", help="print warnings and errors only")
    return arguments


def work(arguments: argparse.Namespace) -> int:
    failures = objects = pictures = 0
    images = find_images(arguments.images)
    if arguments.run is not None:
        model = predictor_of_run(arguments.run, arguments.threshold)
    else:
        config = load_config(arguments.config)
        model = build_predictor(config, arguments.weights, arguments.threshold)
    total, found = count_pictures(images), predict(model, images, arguments.output_dir)
    for _, count, problem in follow(found, total, "predicting", arguments.quiet):
        objects += count or 0
        pictures += count is not None
        if problem is not None:
            failures += 1
            tqdm.write(f"error: {problem}", file=sys.stderr)
    what = counted(objects, "class area" if isinstance(model, Segmenter) else "object")
    where = counted(pictures, "image")
    if any(is_video(file) for file, _ in images):
        where += " and frames"
    if not arguments.quiet:
        print(
            f"{what} in {where}: pictures and predictions.json are in {arguments.output_dir}"
            + (f"; {counted(failures, 'file')} unreadable" if failures else "")
        )
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int | None:
    parsing = parser()
    arguments = parsing.parse_args(argv)
    by_run = arguments.run is not None
    if by_run == (arguments.config is not None) or by_run == (arguments.weights is not None):
        parsing.error("give either --run RUN_DIR, or --config and --weights")
    silence_detectron2()
    stopped = f"stopped: start again; pictures drawn so far are in {arguments.output_dir}"
    return run_tool(lambda: work(arguments), stopped, also=(OSError,)) or None


if __name__ == "__main__":
    sys.exit(main())
