# Every target sets up what it needs in .venv (Python 3.11 or newer); a stamp makes that happen once.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint
LEAN = $(VENV)/.lean
FULL = $(VENV)/.full
MINIMAL = .venv-min/.full

.DEFAULT_GOAL := help
.PHONY: help demo test test-min lint format type bench clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(LEAN) ## Ask three questions about a document of 100,000 tokens
	$(BIN)/python cookbook/demo.py

test: lint type ## Lint, types and all tests
	$(BIN)/python -m pytest -q

test-min: $(MINIMAL) ## Test the integrations against the oldest frameworks they support
	.venv-min/bin/python -m pytest -q tests/integrations

lint: $(FULL) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(FULL) ## Put style and formatting right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(FULL) ## Check types (mypy strict)
	$(BIN)/mypy

bench: $(FULL) ## Measure speed on this CPU; JSON and a picture in benchmarks/results
	$(BIN)/qllm bench speed --lengths 32k,128k --out benchmarks/results

clean: ## Remove what the targets made
	rm -rf $(VENV) .venv-min dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, e.g. make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(LEAN): pyproject.toml constraints.txt | $(BIN)/python
	@test ! -e $(FULL) || exit 0; echo "Installing into $(VENV); the first time takes a few minutes."
	@test -e $(FULL) || $(PIP) constraints.txt --editable '.[langchain]'
	@touch $@

$(FULL): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes a few minutes."
	@$(PIP) constraints.txt --editable '.[all,test]'
	@touch $@

$(MINIMAL): pyproject.toml constraints-min.txt
	$(MAKE) .venv-min/bin/python VENV=.venv-min
	@.venv-min/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints-min.txt \
	  --editable '.[all,test]'
	@touch $@
