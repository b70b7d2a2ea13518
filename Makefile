# `make demo` and `make test` do their own set-up; all they need is Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that an interrupted set-up is done again.
READY := $(VENV)/.ready

# What `make docs` needs besides.
DOCS_READY := $(VENV)/.docs-ready

# The environment of the PyTorch oracle, apart from the product's: several GB.
PARITY := .venv-parity
PARITY_READY := $(PARITY)/.ready

# Large memory pages for large arrays in the tests too (launch.py asks for them by itself).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: setup demo test docs fuzz parity benchmark golden lint lock clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is too old, expected Python 3.11 or newer (make PYTHON=python3.12 ...)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	touch $@

demo: setup
	$(BIN)/python launch.py --config configs/synthetic.py --workdir=runs/demo

test: setup lint
	$(BIN)/python -m pytest -n auto --dist loadfile

# Damaged files for every reader of files, for so long: make fuzz SECONDS=600 [ONLY=cuhk_mat,images].
SECONDS ?= 600
fuzz: setup
	$(BIN)/python -m tests.fuzz --seconds=$(SECONDS) $(if $(ONLY),--only=$(ONLY))

# The pages and the API reference, as docs/_build/html/index.html; a warning is an error.
docs: $(DOCS_READY)
	rm -rf docs/api docs/_build
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo docs/_build/html/index.html

$(DOCS_READY): $(READY) requirements-docs.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-docs.lock
	touch $@

# Everything that needs PyTorch: conversion of .pth files, and parity with the published model.
parity: $(PARITY_READY)
	$(PARITY)/bin/python -m pytest -rP -n 2 --dist load tests/parity tests/weights/convert_test.py

# Our speed beside PyTorch's and what the machine can do: make benchmark [WHAT=search,growth] [RUNS=5].
RUNS ?= 5
benchmark: $(PARITY_READY)
	$(PARITY)/bin/python -m tests.benchmark --runs=$(RUNS) $(if $(WHAT),--what=$(WHAT))

golden: $(PARITY_READY)
	$(PARITY)/bin/python -m tests.oracle.make_golden

$(PARITY_READY): requirements.lock requirements-parity.txt
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-parity.txt
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

# Pins everything that pyproject.toml asks for (needs uv).
lock:
	uv pip compile --quiet --universal --python-version 3.11 --extra dev pyproject.toml \
	  --custom-compile-command "make lock" --output-file requirements.lock
	uv pip compile --quiet --universal --python-version 3.11 --extra docs pyproject.toml \
	  --constraints requirements.lock --custom-compile-command "make lock" --output-file requirements-docs.lock

clean:
	rm -rf $(VENV) $(PARITY) docs/_build docs/api runs/demo data/synthetic
