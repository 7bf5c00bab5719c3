# The set-up and the main jobs, from a fresh clone with CPython, a C++ compiler and make: `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= --numprocesses 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
KERNEL_SOURCES := $(wildcard kernels_cpu/*.cc kernels_cpu/*.h) kernels_cpu/_build.py
INPUTS := pyproject.toml constraints.txt setup.py $(KERNEL_SOURCES)

.PHONY: help demo test lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    create $(VENV), install effjax and run its main job: compress the embedded model, show what it cost"
	@echo "make test    create $(VENV), install effjax with what its tests need, and run them (PYTEST_ARGS=... is passed on)"
	@echo "make lint    check style, formatting and types"
	@echo "make clean   remove $(VENV), build/ and the compiled kernels"
	@echo "PYTHON=...   the interpreter for a new environment (3.11 or later; now $(PYTHON)); VENV=... its place"

demo: $(VENV)/.installed
	@echo "== Running the main job: effjax compress (the embedded model; dense, 8, 4, 3 and 2 bits, 2:4 and low rank)"
	@mkdir -p build
	$(BIN)/effjax compress --out build/demo --overwrite

test: $(VENV)/.installed-test
	@echo "== Running the tests: pytest $(PYTEST_ARGS)"
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-lint
	@echo "== Checking style (ruff check)"
	$(BIN)/ruff check .
	@echo "== Checking formatting (ruff format --check)"
	$(BIN)/ruff format --check .
	@echo "== Checking types (pyright)"
	$(BIN)/pyright --pythonpath $(BIN)/python

# A stamp for each set of packages. The build runs without isolation, against the very jaxlib that will run the kernels.
$(VENV)/.created: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "effjax needs Python 3.11 or later; name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "== Creating the environment $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@echo "== Installing what the build needs: setuptools, and jaxlib for its headers"
	$(PIP) setuptools jaxlib
	@touch $@

$(VENV)/.installed: $(INPUTS) | $(VENV)/.created
	@echo "== Installing effjax and building its native CPU kernels"
	$(PIP) --no-build-isolation --editable .
	@$(BIN)/python -m kernels_cpu
	@touch $@

$(VENV)/.installed-test: $(INPUTS) | $(VENV)/.created
	@echo "== Installing effjax with what its tests need, and building its native CPU kernels"
	$(PIP) --no-build-isolation --editable '.[test]'
	@$(BIN)/python -m kernels_cpu
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-lint: $(VENV)/.installed-test
	@echo "== Installing ruff and pyright"
	$(PIP) --no-build-isolation --editable '.[test,lint]'
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f kernels_cpu/*.so kernels_cpu/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
