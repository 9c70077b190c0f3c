# make demo   sets up, then runs the whole loop on a real small model
# make test   sets up, then runs the tests
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null)
BIN := .venv/bin
ifdef UV
  CREATE = $(UV) venv --quiet --seed --allow-existing --python '>=3.11' .venv
  INSTALL = $(UV) pip install --quiet --python $(BIN)/python
else
  CREATE = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlx_dpo needs Python 3.11 or newer: set PYTHON=python3.11 or install uv")' && $(PYTHON) -m venv .venv
  INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

.PHONY: demo test test-reference check bench clean

demo: .venv/ready
	$(BIN)/mlx_dpo demo $(DEMO_ARGS)

test: .venv/ready-dev
	$(BIN)/python -m pytest -m "not reference" $(PYTEST_ARGS)

test-reference: .venv/ready-reference
	$(BIN)/python -m pytest -m reference $(PYTEST_ARGS)

check: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/ready
	$(BIN)/python -m benchmarks.compare $(BENCH_ARGS)

clean:
	rm -rf .venv build dist *.egg-info

.venv/ready: pyproject.toml
	$(CREATE)
	$(INSTALL) -e .
	touch $@

.venv/ready-dev: .venv/ready
	$(INSTALL) -e '.[dev]'
	touch $@

# torch's CPU build where pip finds one, the ordinary one elsewhere
.venv/ready-reference: .venv/ready-dev
	$(INSTALL) 'torch==2.13.0+cpu' 2>/dev/null || $(INSTALL) torch
	$(INSTALL) -e '.[reference]'
	touch $@
