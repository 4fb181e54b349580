# Two commands on a bare checkout: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= runs/demo
SEED ?= 0

.PHONY: setup demo test lint soak bench-pretrain bench-eval clean

setup: $(STAMP)

# Detectron2 is taken last and by hash into the environment's own folder: see the README,
# "Installation". torch comes first, because packages that build against it need it there.
$(STAMP): setup.py requirements/constraints.txt requirements/detectron2.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt \
	  --no-build-isolation --editable '.[opencv,detectron2-deps,safetensors,shards,slurm,fast-eval,probe,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes \
	  --target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" \
	  --upgrade --python-version 3.10 --only-binary=:all: -r requirements/detectron2.txt
	$(BIN)/python -m pip install --quiet --no-deps --constraint requirements/constraints.txt \
	  timm lightly lvis  # without their dependencies, which would replace ours (tests; LVIS's AP)
	$(BIN)/python -c 'import moco_det, pretrain'
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py -o $(DEMO) --seed $(SEED)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p pretrain -p moco_det

bench-pretrain: $(STAMP)
	$(BIN)/python benchmarks/views.py

bench-eval: $(STAMP)
	$(BIN)/python benchmarks/voc_eval.py

clean:
	rm -rf $(VENV) build dist *.egg-info
