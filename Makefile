# Each of these does all its set-up on a fresh machine: make demo, make test,
# make degradation.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo degradation test slow-test lint clean

demo: $(VENV)/.demo
	$(BIN)/resnet-jax train --config configs/digits.py --workdir runs/digits

# Figures 1 and 6 of the paper in small: four runs, then their picture and report.
degradation: $(VENV)/.demo
	$(BIN)/resnet-jax paper run degradation --workdir runs/degradation
	$(BIN)/resnet-jax paper report --workdir runs/degradation --figures runs/degradation

# A worker that crashes ends the tests, for xdist can wait for ever behind a new one; so
# does a test of a quarter of an hour, with the stacks of its threads.
test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart 0 \
	  -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true -m "not slow"

slow-test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "resnet_jax needs Python 3.11 or newer; say which: make PYTHON=python3.12"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# A stamp an environment: pip runs again only when the dependencies change.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs
