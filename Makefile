# On a fresh machine each of these does its own set-up: make demo, make test, make
# test-all, make degradation.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo degradation docs notebooks test test-all lint wheel address clean

demo: $(VENV)/.demo
	$(BIN)/resnet-jax train --config digits --workdir runs/digits

# Figures 1 and 6 of the paper at small scale: four runs, their figure and report.
degradation: $(VENV)/.demo
	$(BIN)/resnet-jax paper run degradation --workdir runs/degradation
	$(BIN)/resnet-jax paper report --workdir runs/degradation --figures runs/degradation

# Runs the notebooks again and stores their outputs, in a quarter of an hour.
notebooks: $(VENV)/.test
	$(BIN)/python notebooks/execute.py

# A worker that crashes ends the tests, because xdist can wait for ever for a new one. A
# test of 15 minutes ends them too, and prints the stacks of its threads.
test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart 0 \
	  -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true -m "not slow"

test-all: test
	$(BIN)/python -m pytest -m slow

# The documentation, as a site in site/.
docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# What users get who install without a checkout, tried in a clean environment.
wheel: $(VENV)/bin/python
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet "$$(echo dist/*.whl)[demo]"
	cd build/clean && bin/resnet-jax configs && bin/resnet-jax train --config digits \
	  --workdir run --config.training.steps=2 --config.schedule.warmup_steps=1

# Writes the repository's place on GitHub everywhere: make address REPOSITORY=me/resnet_jax
address:
	git grep -lz OWNER/resnet_jax -- ':!Makefile' | \
	  xargs -0 sed -i 's#OWNER/resnet_jax#$(REPOSITORY)#g'

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "resnet_jax needs Python 3.11 or newer; say which: make PYTHON=python3.12"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# A stamp per environment: pip runs again only when the dependencies change.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs site
