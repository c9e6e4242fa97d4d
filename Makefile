# Two commands matter: `make up` runs modelcask, `make test` tests it. Each sets up what it needs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: up test test-clients torture fuzz lint bench setup clean

up: $(VENV)/.installed libfuse
	@exec $(BIN)/modelcask up

test: $(VENV)/.installed-dev libfuse
	$(BIN)/python -m pytest -m "not clients and not large"

test-clients: $(VENV)/.installed-clients libfuse
	$(BIN)/python -m pytest -m "clients or large" --timeout 1200

# Kills, power cuts, failing disks and the like at full size; `make test` runs a sample of each.
torture: $(VENV)/.installed-dev libfuse filesystems
	$(BIN)/python -m pytest -m torture --torture --timeout 3600 -s

# The large run of tests/fuzz: some 1.3 million inputs, a quarter of an hour.
fuzz: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet -e '.[dev,fuzz]'
	$(BIN)/python tests/fuzz/run.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(VENV)/.installed libfuse

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "modelcask needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet -e '.[fuse3]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet -e '.[dev,fuse3]'
	@touch $@ $(VENV)/.installed

# torch first and by itself: its CPU build, where an index offers one, satisfies what the others ask for.
$(VENV)/.installed-clients: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet 'torch==2.13.0'
	$(BIN)/pip install --quiet -e '.[dev,fuse3,clients]'
	@touch $@

.PHONY: libfuse
libfuse:
	@sh .ci/libfuse

.PHONY: filesystems
filesystems:
	@sh .ci/filesystems

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
