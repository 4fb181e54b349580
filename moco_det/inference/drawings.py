"""The files that prediction wrote to a folder, which its predictions.json lists."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from moco_common.errors import UserError
from moco_common.files import read_json

PREDICTIONS = Path("predictions.json")


def drawings(folder: Path) -> set[Path]:
    """Paths, relative to an output folder, of what prediction wrote there: the pictures, the label
    files and predictions.json itself."""
    try:
        content = read_json(folder / PREDICTIONS)
        if "failed" not in content:  # such as COCO's own files
            return set()
        names = list(content.get("files", ()))
        for image in content["images"]:
            names += [image[key] for key in ("picture", "labels") if key in image]
        return {PREDICTIONS, *map(Path, names)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set()  # there is none, or it is another program's


def drawings_near(paths: Sequence[Path]) -> set[Path]:
    """Resolved paths of all drawings in folders, in those below them, and in those above."""
    homes = {home for path in paths for home in path.resolve().parents}
    homes |= {file.parent.resolve() for path in paths for file in path.rglob(str(PREDICTIONS))}
    return {home / name for home in homes for name in drawings(home)}


def check_replaceable(folder: Path, names: Iterable[Path]) -> None:
    """Refuse to replace a file that prediction did not write, such as the photograph itself.

    Args:
        names: paths to write, relative to the output folder.

    Raises:
        UserError: there is such a file.
    """
    own = drawings(folder)
    for name in (PREDICTIONS, *names):
        if name not in own and (folder / name).exists():
            raise UserError(
                f"{folder / name} is not a drawing of an earlier prediction and is not replaced: "
                "choose another --output-dir"
            )
