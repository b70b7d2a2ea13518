# `make demo` and `make test` do their own set-up; all they need is Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that an interrupted set-up is done again.
READY := $(VENV)/.ready

.PHONY: setup demo test lint lock clean

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
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Pins everything that pyproject.toml asks for (needs uv).
lock:
	uv pip compile --quiet --universal --python-version 3.11 --extra dev pyproject.toml \
	  --custom-compile-command "make lock" --output-file requirements.lock

clean:
	rm -rf $(VENV) runs/demo data/synthetic
