# Two commands on a fresh checkout: `make demo` and `make test`. Both set up .venv first.
# PYTHON=FILE sets up .venv with that Python instead of the first supported one on PATH.
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= runs/demo
SEED ?= 0
MUTANTS ?= 20

.PHONY: setup demo test coverage lint mutation soak evidence gpu bench-pretrain bench-finetune bench-startup bench-eval docs clean

setup: $(STAMP)

$(STAMP): setup.py requirements/constraints.txt requirements/detectron2.txt
	@requirements/set_up_environment.sh $(VENV) $(PYTHON)
	@touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py -o $(DEMO) --seed $(SEED)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The tests with coverage of lines and branches, child processes included: two to three times as long.
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

# make mutation [MUTANTS=20] [MODULES='pretrain/losses.py moco_det/conversion']: would a test notice?
mutation: $(STAMP)
	$(BIN)/python -m tests.mutation --mutants $(MUTANTS) --seed $(SEED) $(MODULES)

# Long, run by hand: kill -9 and resume many times; compiled training; readers given broken files; every
# tool given hostile files.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.pretrain.soak --kills 100 --processes 1 2
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.moco_det.soak
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attack
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/moco_det/soak_readers.py tests/pretrain/soak_compile.py

# make evidence DATA=FOLDER [TEST=FOLDER] [EVIDENCE='--detection voc:DIR:trainval voc:DIR:test']
evidence: $(STAMP)
	$(BIN)/python benchmarks/evidence/run.py --data $(DATA) $(if $(TEST),--test $(TEST)) $(EVIDENCE)

# What never ran on a GPU, in MINUTES: correctness first, then speed. Writes runs/gpu/gpu.md.
MINUTES ?= 8
gpu: $(STAMP)
	$(BIN)/python tools/doctor.py --gpu --minutes $(MINUTES) --output-dir runs/gpu

bench-pretrain: $(STAMP)
	$(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/shuffle.py
	$(BIN)/python benchmarks/loader.py

# Our fine-tuning step against Detectron2's own loop: the same losses to the last bit, and the ratio of the times.
bench-finetune: $(STAMP)
	$(BIN)/python benchmarks/finetune.py

# Start-up time of every tool: --help and a usage error, in units of `python -c pass`.
bench-startup: $(STAMP)
	$(BIN)/python benchmarks/startup.py

bench-eval: $(STAMP)
	$(BIN)/python benchmarks/voc_eval.py
	$(BIN)/python benchmarks/coco_eval.py

# Build the documentation in build/site; a warning is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) build dist *.egg-info
