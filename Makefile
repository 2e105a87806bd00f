# Every target sets itself up in .venv; a second run starts in seconds.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# e.g. TORCH_OPTIONS="--index-url <PyTorch's index of CPU wheels>" where the default wheel would bring CUDA
TORCH_OPTIONS ?=
CONSTRAINTS ?= constraints.txt
EXTRAS := train,export,plots,serve,vision
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: setup format check unit test test-engines wheel version-is hooks docs demo tiny clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 1; }
	@echo "Setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV) || { echo "on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@$(PIP) install "pip>=25.1"
	@$(PIP) install $(TORCH_OPTIONS) $(TORCH)
	@$(PIP) install --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]" --group dev
	@touch $@

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

unit: setup
	$(BIN)/python -m pytest -n 2 tests

test: check unit

# the site in site/; a link or an anchor that leads nowhere fails, and so does a table that is stale
docs: setup
	@$(PIP) install --group docs
	$(BIN)/python scripts/result_tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# engines in virtual environments of their own, made once; one that cannot be installed is skipped by its tests
ENGINES ?= llama.cpp mlx vllm

test-engines: setup $(ENGINES:%=.venv-engines/%/.ready)
	$(BIN)/python -m pytest -m engine -rs tests/test_engines.py

.venv-engines/%/.ready: tests/engines/install.py
	@echo "Setting up $* (once)"
	@$(PYTHON) -m venv $(@D)
	@$(PYTHON) $< $* $(@D)/bin/python $(TORCH_OPTIONS) && touch $@ || { echo "$* cannot be had here"; rm -rf $(@D); }

# dist/, and what a user of it gets: installed without extras, it converts and generates
wheel: setup
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m pytest -m wheel tests/test_wheel.py

# fails unless the package has that version; a release asks it of its tag
version-is:
	@grep -qxF '__version__ = "$(VERSION)"' src/moesaic/__init__.py || \
		{ echo "src/moesaic/__init__.py does not have version '$(VERSION)'"; exit 1; }

# runs what .pre-commit-config.yaml says before each commit
hooks: setup
	@$(PIP) install pre-commit
	$(BIN)/pre-commit install

# measures llama.cpp too, where its module for Python can be installed
LLAMA_CPP := .venv-engines/llama.cpp

demo: setup $(LLAMA_CPP)/.ready
	$(BIN)/moesaic demo --overwrite --out demo-output \
		$$(test -x $(LLAMA_CPP)/bin/python && echo --llama-cpp $(LLAMA_CPP)/bin/python)

# trains the built-in tiny model anew (a quarter of an hour)
tiny: setup
	$(BIN)/python scripts/train_tiny.py tiny src/moesaic/data/tiny

clean:
	rm -rf $(VENV) dist demo-output demo-output.partial site
