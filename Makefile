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

# The environment with the compilers for accelerators that are not here: some 450 MB to download.
AOT := .venv-aot
AOT_READY := $(AOT)/.ready

# On CPUs, XLA asks for the memory of a step anew in every step: large pages, and memory that is kept
# for reuse, save a twentieth of the demo's processor time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:$\
  glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=268435456

.PHONY: setup demo serve test shapes test-newest docs soak parity benchmark accelerators \
  accelerators-short setup-accelerators golden lint lock clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is too old, expected Python 3.11 or newer (make PYTHON=python3.12 ...)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/python launch.py --config configs/synthetic.py --workdir=runs/demo

# The test photos of the demo as a gallery, and the page that searches it, at the address it prints,
# until Ctrl-C (make serve PORT=8001). Photos that the gallery knows are not looked at again.
PORT ?= 8000
DEMO := runs/demo
SERVED := --checkpoint=$(DEMO) --gallery=$(DEMO)/people.lance
serve: setup
	@test -d $(DEMO)/checkpoints || { echo "error: found no $(DEMO), expected the demo; run make demo first"; exit 2; }
	mkdir -p $(DEMO)/photos
	$(BIN)/python -c "from data_pipeline.sources.cuhk_sysu import CuhkSysuSource; \
	  print(*CuhkSysuSource('data/synthetic').test.names, sep='\n')" | \
	  (cd $(DEMO)/photos && xargs -I NAME ln -sfn $(CURDIR)/data/synthetic/Image/SSM/NAME NAME)
	$(BIN)/python launch.py --mode=index $(SERVED) --source=$(DEMO)/photos
	$(BIN)/python launch.py --mode=serve $(SERVED) --port=$(PORT)

test: setup lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The same with every annotation of an array checked at every call (jaxtyping and beartype);
# make shapes TESTS=tests/losses looks at one room.
TESTS ?= tests
shapes: setup
	CHECK_SHAPES=1 $(BIN)/python -m pytest -n auto --dist loadfile $(TESTS)

# The newest Python that is here (3.12 or later, on the PATH or pyenv's), with the lock's newest JAX:
# the network, the losses, and one small training run.
NEWEST := .venv-newest
NEWEST_READY := $(NEWEST)/.ready
PYTHON_NEWEST ?= $(shell for minor in 16 15 14 13 12; do \
  for python in python3.$$minor "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.$$minor.*/bin/python; do \
  "$$python" -c "import sys; sys.exit(sys.version_info[:2] != (3, $$minor))" 2>/dev/null \
  && echo "$$python" && exit; done; done)
NEWEST_TESTS := tests/nn/model_test.py tests/losses tests/training/step_test.py \
  tests/training/train_test.py::test_a_run_writes_what_it_promises

test-newest: $(if $(PYTHON_NEWEST),$(NEWEST_READY))
ifeq ($(PYTHON_NEWEST),)
	@echo "test-newest: left out, found no Python 3.12 or newer (make test-newest PYTHON_NEWEST=...)"
else
	$(NEWEST)/bin/python -m pytest -n auto --dist loadfile $(NEWEST_TESTS)
endif

$(NEWEST_READY): requirements.lock pyproject.toml
	$(PYTHON_NEWEST) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	touch $@

# Training that is killed at random moments, or finds a full disk: make soak [KILLS=50] [PROCESSES=1].
KILLS ?= 50
PROCESSES ?= 1
soak: setup
	$(BIN)/python -W ignore -m tests.soak --kills=$(KILLS) --processes=$(PROCESSES)

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
	$(PARITY)/bin/python -m pytest -rP -n 2 --dist load tests/parity tests/weights

# The network beside PyTorch's, a gallery that grows, starts: make benchmark [WHAT=inference,train] [RUNS=5].
# WHAT=starts AGAINST=../before: seconds to the first result, in turns with another checkout.
RUNS ?= 5
benchmark: $(PARITY_READY)
	$(PARITY)/bin/python -m tests.benchmark --runs=$(RUNS) $(if $(WHAT),--what=$(WHAT)) $(if $(AGAINST),--against=$(AGAINST))

# Inference and the paper's largest training step, compiled for chips that are not here: some ten
# minutes on two cores. Fails if a step does not compile or does not fit (docs/scaling.md). The short
# form has small images.
AHEAD = $(AOT)/bin/python launch.py --mode=scaling --config=configs/cuhk.py
ALL_CHIPS := --topology=h100:8,a100:1,v100:1,v5e:2x4
accelerators: $(AOT_READY)
	$(AHEAD) $(ALL_CHIPS) --what=inference --batch=1
	$(AHEAD) $(ALL_CHIPS) --what=inference --batch=1 --config.eval.dtype=bfloat16
	$(AHEAD) $(ALL_CHIPS) --what=train --batch=4
	$(AHEAD) $(ALL_CHIPS) --what=train --batch=4 --config.model.dtype=bfloat16

accelerators-short: $(AOT_READY)
	$(AHEAD) --topology=h100:8,v5e:2x4 --batch=1 --target=runs/scaling/short.json \
	  --config.data.test_scale="(667,400)" --config.data.train_scales="((667,400),)"

setup-accelerators: $(AOT_READY)

$(AOT_READY): requirements-aot.lock
	$(PYTHON) -m venv $(AOT)
	$(AOT)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-aot.lock
	touch $@

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
	uv pip compile --quiet --universal --python-version 3.11 --extra dev --extra gallery --extra cluster pyproject.toml \
	  --custom-compile-command "make lock" --output-file requirements.lock
	uv pip compile --quiet --universal --python-version 3.11 --extra docs pyproject.toml \
	  --constraints requirements.lock --custom-compile-command "make lock" --output-file requirements-docs.lock
	uv pip compile --quiet --universal --python-version 3.11 --extra aot pyproject.toml \
	  --constraints requirements.lock --custom-compile-command "make lock" --output-file requirements-aot.lock

clean:
	rm -rf build *.egg-info $(VENV) $(PARITY) $(NEWEST) $(AOT) docs/_build docs/api runs/demo data/synthetic
