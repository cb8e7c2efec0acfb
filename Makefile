# make demo   the whole path on a small data set, offline, in about a minute after the install
# make test   everything a change has to pass
# make faults the fault tests at full length (docs/reliability.md), with a log in faults.log
#
# Both make .venv first, and keep it as long as pyproject.toml stays the same. Another Python:
# make test PYTHON=python3.13

# JOBS test processes run side by side, of about 2 GB each.

PYTHON ?= python3
JOBS ?= 2
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format long faults docs wheel clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile

install: $(READY) ## Make the environment

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[dev]'
	@touch $@

demo: $(READY) ## Train, quantize, export and verify a small net
	@$(BIN)/mecq demo --force

lint: $(READY) ## Style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports --no-cache --no-logo

test: lint ## Lint, then the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

long: $(READY) ## The tests that take minutes
	$(BIN)/python -m pytest -m long --timeout 3600

faults: $(READY) ## The fault tests at full length
	@{ date; uname -srm; $(BIN)/python -V; $(BIN)/python -c 'import torch; print("torch", torch.__version__)'; } >faults.log
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -m 'long or not long' --timeout 3600 >>faults.log; \
	code=$$?; date >>faults.log; cat faults.log; exit $$code

docs: $(READY) ## Build the documentation as a site, into build/site
	$(BIN)/python -c 'import material' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check -q -e '.[docs]'
	# With --quiet, --strict would not see the warnings it is to stop at.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file .mkdocs.yml
	@echo build/site/index.html

wheel: $(READY) ## Wheel and sdist in dist/, and a test of both
	rm -rf dist
	$(BIN)/python -m hatchling build
	$(BIN)/python -m pytest -q tests/test_package.py

format: $(READY) ## Rewrite the code in the common style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and everything generated
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
