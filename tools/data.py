#!/usr/bin/env python3
"""Survey data sets: check, count and draw what they hold, and convert it to COCO's format."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tools  # noqa: F401 (handles a Ctrl-C during the imports)

from moco_common.errors import UserError, run_tool
from moco_common.files import check_exists

EPILOG = """examples:
  data.py voc:boxes:trainval voc:boxes:test              # check and count; find copies in both
  data.py yolo:export --check-images --strict            # exit 1 if anything is wrong
  data.py coco:boxes.json:images --sheet boxes.jpg       # look at the boxes and masks
  data.py voc:boxes --to-coco boxes.json --split 80%     # boxes-train.json and boxes-val.json
  data.py photos --check-images --sheet photos.jpg       # photographs to pre-train on
"""
ANNOTATED = ("voc:", "coco:", "yolo:", "semseg:")


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(
        prog="moco-data", description=__doc__, epilog=EPILOG, formatter_class=layout
    )
    add = result.add_argument
    what = "{voc,coco,yolo}:DIR[:SPLIT], coco:JSON[:IMAGES], semseg:IMAGES:LABELS, a Detectron2 "
    what += "name; or photographs: a folder, a .txt list, shards:URL"
    add("specs", nargs="+", metavar="SPEC", help=what)
    add("--strict", action="store_true", help="exit with 1 if there is any finding")
    add("--check-images", action="store_true", help="decode all images; exit with 1 if any fails")
    add("--no-masks", action="store_true", help="boxes only: masks are neither judged nor drawn")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--sheet", type=Path, metavar="FILE", help="contact sheet to draw, .jpg or .png")
    add("--images", type=int, default=16, metavar="N", help="images on the sheet (default: 16)")
    add("--to-coco", type=Path, metavar="FILE", help="COCO annotation file to write, .json")
    add("--quiet", action="store_true", help="print findings and errors only")
    what = "share of the training images; --to-coco then writes FILE-train.json and FILE-val.json"
    add("--split", metavar="SHARE", help=what)
    return result


def check(args: argparse.Namespace) -> bool:
    """Check the arguments; return True if all SPECs are photographs without annotations."""
    if args.split and not args.to_coco:
        raise UserError("--split needs --to-coco FILE.json, the files to write.")
    if len(args.specs) > 1 and (args.sheet or args.to_coco):
        raise UserError("--sheet and --to-coco take one SPEC: run the command once for each.")
    if args.sheet and args.sheet.suffix.lower() not in (".jpg", ".png"):
        raise UserError(f"--sheet {args.sheet} must end in .jpg or .png.")
    if args.to_coco and args.to_coco.suffix.lower() != ".json":
        raise UserError(f"--to-coco {args.to_coco} must end in .json.")
    plain = [spec for spec in args.specs if not spec.startswith(ANNOTATED)]
    photographs = [s for s in plain if s.startswith("shards:") or Path(s).expanduser().exists()]
    for spec in plain:
        if "/" in spec:
            check_exists(spec)
    if photographs and len(photographs) < len(args.specs):
        raise UserError(f"{photographs[0]} has no annotations: survey photographs by themselves.")
    if photographs and args.to_coco:
        raise UserError(f"{photographs[0]} has no annotations to convert: leave --to-coco out.")
    return bool(photographs)


def work(args: argparse.Namespace) -> int:
    photographs = check(args)
    options = vars(args)
    options["masks"], options["as_json"] = not options.pop("no_masks"), options.pop("json")
    if photographs:
        from pretrain.inspection.photographs import survey_photographs

        names = ("specs", "check_images", "as_json", "sheet", "images", "quiet")
        return survey_photographs(**{name: options[name] for name in names})
    from moco_det.survey.survey import Options, survey

    return survey(Options(**options))


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(lambda: work(args), "stopped: run the same command again", also=(OSError,))


if __name__ == "__main__":
    sys.exit(main())
