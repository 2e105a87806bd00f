# Every target sets itself up in .venv; a second run starts in seconds.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# e.g. TORCH_OPTIONS="--index-url <PyTorch's index of CPU wheels>" where the default wheel would bring CUDA
TORCH_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: setup format check test test-engines demo tiny clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 1; }
	@echo "Setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV) || { echo "on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@$(PIP) install "pip>=25.1"
	@$(PIP) install $(TORCH_OPTIONS) $(TORCH)
	@$(PIP) install --constraint constraints.txt --editable . --group dev
	@touch $@

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

test: check
	$(BIN)/python -m pytest -n 2 tests

# engines in virtual environments of their own, made once; one that cannot be installed is skipped by its tests
ENGINES ?= llama.cpp mlx vllm

test-engines: setup $(ENGINES:%=.venv-engines/%/.ready)
	$(BIN)/python -m pytest -m engine -rs tests/test_engines.py

.venv-engines/%/.ready: tests/engines/install.py
	@echo "Setting up $* (once)"
	@$(PYTHON) -m venv $(@D)
	@$(PYTHON) $< $* $(@D)/bin/python $(TORCH_OPTIONS) && touch $@ || { echo "$* cannot be had here"; rm -rf $(@D); }

demo: setup
	$(BIN)/moesaic demo --out demo-output

# trains the built-in tiny model anew (a quarter of an hour)
tiny: setup
	$(BIN)/python scripts/train_tiny.py src/moesaic/data/tiny

clean:
	rm -rf $(VENV) demo-output demo-output.partial
