"""Draws detections.jpg beside itself, from a finished demo.

make demo
python docs/figures/detections.py runs/demo
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from moco_det.report.example_images import compare_runs

WIDTH = 720  # pixels


def draw(demo: Path, picture: Path) -> None:
    """Three test images: their objects, and what both detectors of the demo found."""
    detectors = {"random weights": demo / "detect-random", "MoCo weights": demo / "detect-moco"}
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large.png"
        test = f"voc:{demo / 'scenes' / 'voc'}:test"
        compare_runs(test, detectors, large, num_images=3, seed=0)
        image = Image.open(large).convert("RGB")
    height = round(WIDTH * image.height / image.width)
    image.resize((WIDTH, height), Image.Resampling.LANCZOS).save(picture, quality=82)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(__file__).with_name("detections.jpg"))
