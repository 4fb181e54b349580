# Two commands on a bare checkout: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= runs/demo
SEED ?= 0

.PHONY: setup demo test coverage lint soak evidence bench-pretrain bench-eval docs clean

setup: $(STAMP)

# Detectron2 is taken last and by hash into the environment's own folder: see the README,
# "Installation". torch comes first, because packages that build against it need it there. The last
# packages are peers of the tests, taken alone: what they depend on would replace ours.
$(STAMP): setup.py requirements/constraints.txt requirements/detectron2.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt \
	  --no-build-isolation --editable '.[opencv,detectron2-deps,safetensors,shards,slurm,fast-eval,docs,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes \
	  --target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" \
	  --upgrade --python-version 3.10 --only-binary=:all: -r requirements/detectron2.txt
	$(BIN)/python -m pip install --quiet --no-deps --constraint requirements/constraints.txt \
	  timm lightly lvis cityscapesscripts pyquaternion shapely
	$(BIN)/python -c 'import moco_det, pretrain'
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py -o $(DEMO) --seed $(SEED)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Tests with every line and branch counted, child processes included: two to three times as long.
coverage: $(STAMP)
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -o timeout=900 --cov --cov-report=
	$(BIN)/coverage report --include='moco_common/*' --skip-covered --fail-under 90
	$(BIN)/coverage report --include='pretrain/*' --skip-covered --fail-under 90
	$(BIN)/coverage report --include='moco_det/*' --skip-covered --fail-under 90

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p moco_common -p pretrain -p moco_det

# Slow and by hand: kill -9 and resume, over and over; compiled training; readers on broken files.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.pretrain.soak --kills 100 --processes 1 2
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.moco_det.soak
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/moco_det/soak_readers.py tests/pretrain/soak_compile.py

# make evidence DATA=FOLDER [TEST=FOLDER] [EVIDENCE='--detection voc:DIR:trainval voc:DIR:test']
evidence: $(STAMP)
	$(BIN)/python benchmarks/evidence/run.py --data $(DATA) $(if $(TEST),--test $(TEST)) $(EVIDENCE)

bench-pretrain: $(STAMP)
	$(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/shuffle.py
	$(BIN)/python benchmarks/loader.py

bench-eval: $(STAMP)
	$(BIN)/python benchmarks/voc_eval.py
	$(BIN)/python benchmarks/coco_eval.py

# The documentation as pages in build/site; warnings are errors.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) build dist *.egg-info
