# Everything runs in a virtual environment of its own, made on first use. Needs only Python >= 3.11 and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard proto/fusewire/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help install demo serve test test-gpu check format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@echo "==> making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	@echo "==> installing Fusewire and what it needs (PyTorch is the long part)"
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "==> installing the test and lint tools"
	$(BIN)/python -m pip install --group dev
	@touch $@

install: $(VENV)/.installed ## Make the virtual environment and install Fusewire into it

demo: $(VENV)/.installed ## Serve the embedded model, stream one prompt on both kernel paths, compare, stop
	$(BIN)/fusewire demo

serve: $(VENV)/.installed ## Serve the embedded model on 127.0.0.1:50051 until Ctrl-C
	$(BIN)/fusewire serve

test: $(VENV)/.installed-dev check ## Run every check and every test that needs no GPU
	$(BIN)/pytest

test-gpu: $(VENV)/.installed-dev ## Run the tests that need a CUDA device
	$(BIN)/pytest -m gpu

check: $(VENV)/.installed-dev ## Lint, types, import contracts and the wire's style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

format: $(VENV)/.installed-dev ## Format the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the virtual environment and everything generated
	rm -rf $(VENV) gen build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
