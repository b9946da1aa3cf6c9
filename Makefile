# Every target sets itself up: all it needs is Python 3.11 or newer (PYTHON=... chooses which).
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-core test-adapter lint test-matrix bench examples run-examples docs clean say-demo say-test say-adapter say-lint say-test-matrix say-bench say-examples say-docs

# The first of these that runs and is new enough; one may exist and yet not run (a pyenv shim).
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
endif

VENV := .venv
PY := $(VENV)/bin/python
# -qq leaves pip's errors and nothing else. All environments share pip's own cache.
PIP_INSTALL := $(PY) -m pip install -qq --disable-pip-version-check
PYTEST_ARGS ?=
ADAPTER_PYTEST_ARGS ?=

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: say-demo $(VENV)/.ready-demo $(VENV)/.ready-adapter ## Run the main job on real foreign code, and on a Tesseract
	@$(PY) demo/run.py
	@$(PY) adapters/tesseract/demo/run.py

test: test-core test-adapter ## Run all tests

test-core: say-test $(VENV)/.ready-test ## Run the tests and the doctests (PYTEST_ARGS='-k vmap' and the like)
	@$(PY) -m pytest -q $(PYTEST_ARGS)

test-adapter: say-adapter $(VENV)/.ready-adapter ## Run the Tesseract adapter's tests (ADAPTER_PYTEST_ARGS='-k jacrev' and the like)
	@cd adapters/tesseract && ../../$(PY) -m pytest -q $(ADAPTER_PYTEST_ARGS)

lint: say-lint $(VENV)/.ready-test $(VENV)/.ready-adapter $(VENV)/.ready-lint ## Check style (ruff) and types (pyright)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pyright --pythonpath $(PY)

test-matrix: say-test-matrix $(VENV)/.ready-python ## Run the tests on the oldest and the newest supported jax
	@$(PY) .ci/matrix.py $(PYTEST_ARGS)

bench: say-bench $(VENV)/.ready-test $(VENV)/.ready-adapter $(VENV)/.ready-bench ## Measure against JAX and other peers, and write docs/benchmarks.md
	@$(PY) benchmarks/run.py --write

examples: say-examples ## Run every file of examples/, in an environment of its own
	@$(MAKE) --no-print-directory VENV=.venv-examples run-examples

# No conftest: it is for tests that import JAX, and these start programs that do.
run-examples: $(VENV)/.ready-examples
	@ALL_EXAMPLES=1 $(PY) -m pytest -q -s --noconftest -p no:cacheprovider tests/test_examples.py

docs: say-docs .venv-docs/.ready ## Build the documentation into site/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict

clean: ## Remove the environments and all that tools left behind
	rm -rf .venv .venv-docs .venv-examples .venv-matrix build dist site .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- what each target says first, before any set-up -----------------------------------------------------

say-demo:
	@echo '==> make demo: real foreign code under jax.vmap, each method against JAX (demo/run.py)'
say-test:
	@echo '==> make test: the tests, the doctests of batchrules/, and the code in README.md and docs/'
say-adapter:
	@echo '==> make test-adapter: adapters/tesseract, against Tesseracts that it serves'
say-lint:
	@echo '==> make lint: ruff check, ruff format --check, pyright'
say-test-matrix:
	@echo '==> make test-matrix: the tests on the oldest and on the newest jax, each in its own environment'
say-bench:
	@echo '==> make bench: side by side in one process, as ratios (benchmarks/run.py)'
say-examples:
	@echo '==> make examples: each file of examples/, which compares its numbers with a twin in JAX'

say-docs:
	@echo '==> make docs: the pages of docs/ and the reference, into site/ (mkdocs.yml)'

# --- set-up -----------------------------------------------------------------------------------------------

# The stamp is written last, so an environment that was left half made is made again.
$(VENV)/.ready-python:
	@$(if $(PYTHON),,echo 'batchrules needs Python 3.11 or newer, and found none on PATH.' \
		'Install one, or name it: make PYTHON=/path/to/python3.11' >&2; exit 1)
	@echo '==> set-up: $(VENV), with $(PYTHON)'
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || $(PYTHON) -m virtualenv -q $(VENV) || { rm -rf $(VENV); \
		echo 'No virtual environment could be made with $(PYTHON) (its own message is above).' \
			'On Debian or Ubuntu: apt install python3-venv. Elsewhere: $(PYTHON) -m pip install virtualenv.' \
			'Or choose another interpreter: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@touch $@

$(VENV)/.ready-adapter: adapters/tesseract/pyproject.toml $(VENV)/.ready-test
	@echo '==> set-up: batchrules-tesseract[test] into $(VENV)'
	@$(PIP_INSTALL) -e 'adapters/tesseract[test]'
	@touch $@

$(VENV)/.ready-examples: pyproject.toml adapters/tesseract/pyproject.toml examples/requirements.txt $(VENV)/.ready-python
	@echo '==> set-up: examples/requirements.txt into $(VENV) (the first time this takes a minute or two)'
	@$(PIP_INSTALL) -e . -e adapters/tesseract -r examples/requirements.txt
	@touch $@

# An environment of its own: what builds the pages is no part of what is tested.
.venv-docs/.ready: pyproject.toml
	@$(MAKE) --no-print-directory VENV=.venv-docs .venv-docs/.ready-docs
	@touch $@

$(VENV)/.ready-%: pyproject.toml $(VENV)/.ready-python
	@echo '==> set-up: batchrules[$*] into $(VENV) (the first time this takes a minute)'
	@$(PIP_INSTALL) -e '.[$*]'
	@touch $@
