"""The versions of the project and of its requirements, read by setup.py without other imports."""

__version__ = "0.1.0"
# Oldest and newest version that the tests were run with (see docs/versions.md). The oldest are the
# lower bounds in setup.py and the pins in requirements/oldest.txt; the newest are those in
# requirements/constraints.txt.
TESTED = {
    "python": ("3.10", "3.13"),
    "torch": ("2.1.0", "2.14.1"),
    "torchvision": ("0.16.0", "0.29.1"),
    "numpy": ("1.24.0", "2.4.6"),
    "pillow": ("9.5.0", "13.0.0"),
    "opencv-python-headless": ("4.8.0.76", "5.0.0.93"),
    "fvcore": ("0.1.5.post20221221", "0.1.5.post20221221"),
    "pycocotools": ("2.0.7", "2.0.11"),
}
