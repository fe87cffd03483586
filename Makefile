# Each target first sets up .venv, once. `make help` lists them.
PYTHON ?= python3
# What exports are for: export, or gpu-export on a machine with an NVIDIA GPU.
EXTRA ?= export
# Further arguments for pip, such as an index with smaller PyTorch wheels.
PIP_ARGS ?=

# Each process takes up to 3 GB. A file's tests share what they export, so a file stays in one process.
PARALLEL ?= --numprocesses auto --maxprocesses 8 --dist loadfile

OLDEST_TRANSFORMERS := 5.2.*
QUICK := not slow and not gpu

BIN := .venv/bin
READY := .venv/.ready
LIBRARY := calibration demo exporter runtime
CHECKED := $(LIBRARY) leanvlm bench tests

IMAGE := demo/samples/complex-9003.png
QUESTION := What is below the green ring?
BUNDLE := out/demo-64
OVERLAY := out/kept.png

.DEFAULT_GOAL := help
.PHONY: help demo train evaluate test test-fast test-slow test-gpu test-transformers lint types wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("make: exporting needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),dev]' $(PIP_ARGS)
	@touch $@

demo: $(READY) ## export the built-in model, ask it about a sample image, profile it
	$(BIN)/leanvlm export --model demo --budget 64 -o $(BUNDLE) --force
	@rm -f $(OVERLAY)
	$(BIN)/leanvlm run $(BUNDLE) --image $(IMAGE) --prompt '$(QUESTION)' --overlay $(OVERLAY)
	$(BIN)/leanvlm profile $(BUNDLE) --image $(IMAGE)
	@echo
	@echo 'The image with the kept patches marked: $(OVERLAY)'
	@echo 'Ask something else: $(BIN)/leanvlm run $(BUNDLE) --image $(IMAGE)'

train: $(READY) ## train the built-in model anew, from its seed, into out/trained (an NVIDIA GPU, minutes)
	$(BIN)/python -m leanvlm.demo.training.train --seed 2 --output out/trained

evaluate: $(READY) ## measure again what the built-in model's card says (minutes)
	$(BIN)/python -m leanvlm.calibration.model_card

test: $(READY) ## run the tests, on up to 8 processor cores
	$(BIN)/pytest $(PARALLEL) -m '$(QUICK) and not alone'
	$(BIN)/pytest -m '$(QUICK) and alone'

test-fast: $(READY) ## run the tests without exports and processes (two minutes)
	$(BIN)/pytest -m fast

test-slow: $(READY) ## run the tests that take minutes
	$(BIN)/pytest -m slow

test-gpu: $(READY) ## run the tests that need a CUDA device; set up with EXTRA=gpu-export
	$(BIN)/pytest -m gpu

# Only what transformers itself needs is put before the environment's packages; PyTorch is the same.
test-transformers: $(READY) ## run the built-in models with the oldest transformers that is supported
	rm -rf .venv-oldest
	$(BIN)/pip install --quiet --disable-pip-version-check --target .venv-oldest 'transformers==$(OLDEST_TRANSFORMERS)' $(PIP_ARGS)
	PYTHONPATH=.venv-oldest $(BIN)/pytest tests/test_transformers.py

lint: $(READY) ## check style and format
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

# Type checkers do not follow an editable install's import hook; these links stand in for what it maps into leanvlm.
types: $(READY) ## check types; the runtime also as Python 3.10
	@mkdir -p .types/leanvlm
	@for folder in $(LIBRARY); do ln -sfn ../../$$folder .types/leanvlm/$$folder; done
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 -p leanvlm.runtime

# setuptools keeps deleted files in build/, and would ship them.
wheel: $(READY) ## build dist/*.whl
	rm -rf build dist
	$(BIN)/python -m build --quiet --wheel

clean: ## remove what the targets made
	rm -rf .venv .venv-* .types .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist out *.egg-info
