# VENV: where the virtual environment is; ARGS: more arguments for the command at the end of a target.
VENV ?= .venv
PYTHON ?= python3
ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable
BENCHMARKS = $(shell $(BIN)/python -m benchmarks --names)

.PHONY: setup serve proto fmt check test test-ray test-all nightly bench
.DEFAULT_GOAL := setup

setup: $(VENV)/.installed

serve: setup
	$(BIN)/moesaic serve $(ARGS)

# cluster/rpc from proto/, both of which are committed.
proto: setup
	$(BIN)/python proto/generate.py

fmt: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/buf lint proto

# Seconds: no Ray, nothing slow.
test: setup
	$(BIN)/python -m pytest tests/unit -m "not slow" $(ARGS)

# Minutes: real servers.
test-ray: setup
	$(BIN)/python -m pytest -m ray $(ARGS)

test-all: setup
	$(BIN)/python -m pytest $(ARGS)

# What is too long for every push: many starts, in many environments.
nightly: setup
	$(BIN)/python -m pytest -m nightly $(ARGS)

# The quick form of each; fails if any target was missed.
bench: $(VENV)/.installed-bench
	missed=0; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks $$name --quick $(ARGS) || missed=1; done; exit $$missed

# Installed again when the requirements, or what is compiled, have changed.
$(VENV)/.installed: pyproject.toml actors/kernels/native.c $(wildcard actors/kernels/*.h)
	@echo "installing into $(VENV); the first time takes minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) '.[dev]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP_INSTALL) '.[bench]'
	touch $@
