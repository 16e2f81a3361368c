# Environments are made here, from pyproject.toml and constraints.txt, in folders of their own:
# .venv-demo-cpu, .venv-test-cpu, ... A changed requirement makes a fresh one; `.venv` is never touched.

PYTHON ?= python3
# Which onnxruntime: cpu or cuda (onnxruntime-gpu). The two provide one module, so each has its own environment.
ORT ?= $(shell if nvidia-smi -L >/dev/null 2>&1 || [ -e /proc/driver/nvidia/version ]; \
         then echo cuda; else echo cpu; fi)
VENV ?= .venv-test-$(ORT)
DEMO_VENV ?= .venv-demo-$(ORT)
DIST ?= dist
PYTEST_ARGS ?= -n 2

BIN := $(VENV)/bin
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check -c constraints.txt
REQUIREMENTS := pyproject.toml constraints.txt

# pyright is run from its wheel by the node of another wheel: nothing is downloaded when it runs.
export PYRIGHT_PYTHON_GLOBAL_NODE := 0
export PYRIGHT_PYTHON_USE_BUNDLED_PYRIGHT := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

ifeq ($(filter $(ORT),cpu cuda),)
$(error ORT=$(ORT): say ORT=cpu or ORT=cuda)
endif

.PHONY: help demo test lint format types mypy pyright contracts wheel smoke check clean

help:
	@echo "make demo       analyze, rewrite, validate and bench the bundled models in a fresh environment"
	@echo "make test       the tests, in an environment of their own"
	@echo "make check      test lint types contracts wheel smoke"
	@echo "make lint       ruff check and ruff format --check   (make format: apply both)"
	@echo "make types      mypy and pyright"
	@echo "make contracts  which module may import which"
	@echo "make wheel      sdist and wheel in $(DIST)/"
	@echo "make smoke      install that wheel elsewhere and run it"
	@echo "make clean      remove environments, caches and build results"
	@echo "variables: ORT=cpu|cuda (now $(ORT)), PYTHON=$(PYTHON), PYTEST_ARGS='$(PYTEST_ARGS)'"

demo: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/onnx-decompose demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: mypy pyright

mypy: $(VENV)/.dev-installed
	$(BIN)/mypy

pyright: $(VENV)/.dev-installed
	$(BIN)/pyright --pythonpath $(BIN)/python

contracts: $(VENV)/.dev-installed
	$(BIN)/lint-imports

wheel: $(VENV)/.dev-installed
	rm -f $(DIST)/onnx_decompose-*
	$(BIN)/python -m build --no-isolation --outdir $(DIST)

smoke: wheel
	PYTHON=$(PYTHON) ORT=$(ORT) .ci/smoke $(DIST)/onnx_decompose-*.whl

check: test lint types contracts wheel smoke

clean:
	rm -rf .venv-demo-* .venv-test-* build dist out .cache *.egg-info .coverage* htmlcov
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find onnx_decompose passes models tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO_VENV)/.installed: $(REQUIREMENTS)
	$(call fresh_venv,$(DEMO_VENV))
	$(DEMO_VENV)/bin/python $(PIP_INSTALL) -e '.[$(ORT)]'
	@touch $@

$(VENV)/.installed: $(REQUIREMENTS)
	$(call fresh_venv,$(VENV))
	$(BIN)/python $(PIP_INSTALL) -e '.[$(ORT),export,report,test]'
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.installed
	$(BIN)/python $(PIP_INSTALL) -e '.[$(ORT),export,report,test,dev]'
	@touch $@

define fresh_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
$(PYTHON) -m venv --clear $(1)
endef
