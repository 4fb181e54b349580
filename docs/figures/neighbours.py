"""Draws neighbours.jpg beside itself, from a pre-training run whose images are where they were.

python docs/figures/neighbours.py runs/moco
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from pretrain.inspection.inspect_run import Settings, inspect_run

WIDTH = 560  # pixels


def draw(run: str, picture: Path) -> None:
    """Eight random images of the run, and the four that its features take to be most like each."""
    with tempfile.TemporaryDirectory() as folder:
        inspect_run(Settings(run, output=Path(folder), k=4))
        image = Image.open(Path(folder) / "neighbours.png").convert("RGB")
    height = round(WIDTH * image.height / image.width)
    image.resize((WIDTH, height), Image.Resampling.LANCZOS).save(picture, quality=75, optimize=True)


if __name__ == "__main__":
    draw(sys.argv[1], Path(__file__).with_name("neighbours.jpg"))
