# Two commands matter: `make quickstart` and `make test`. Each sets up everything it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes; each computes with one thread.
WORKERS ?= 2
QUICKSTART := output/quickstart
# Environment with the oldest PyTorch that is supported.
OLDEST := .venv-oldest

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-oldest lint format quickstart clean

help:
	@echo "make quickstart   train on drawn scenes, evaluate, run the demo, leave pictures in $(QUICKSTART)"
	@echo "make test         lint, types and tests"
	@echo "make test-slow    what \`make test\` leaves out: a step of every recipe, with up to 24 GB of memory"
	@echo "make test-oldest  the tests with the oldest supported PyTorch (2.6), in $(OLDEST)"
	@echo "make setup        create $(VENV) and install the package with its test tools"
	@echo "make lint         ruff and mypy alone"
	@echo "make format       let ruff rewrite the sources"
	@echo "make clean        remove the environments, builds and caches; output/ stays"

setup: $(VENV)/.installed

# The stamp makes the second run instant; new requirements install again.
$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -c "import sys; sys.exit('error: maskformer needs Python 3.10 or newer; give one as PYTHON=' if sys.version_info < (3, 10) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

# One process: some of them take most of the memory.
test-slow: setup
	$(BIN)/pytest -m slow --timeout 3600

# Lint and types are checked with the newest version alone, whose stubs differ.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -n $(WORKERS) --dist loadfile

$(OLDEST)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		"torch==2.6.*" "torchvision==0.21.*" --editable ".[test]"
	touch $@

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quickstart: setup
	$(BIN)/maskformer train --config-file configs/quickstart/shapes_panoptic.yaml OUTPUT_DIR $(QUICKSTART)
	$(BIN)/maskformer demo --config-file configs/quickstart/shapes_panoptic.yaml --weights $(QUICKSTART)/model_final.pth \
		--input docs/images/scenes --output $(QUICKSTART)/demo

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/_build
	find maskformer tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
