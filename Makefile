# Two commands for a fresh clone: `make demo` and `make test`. Both set up .venv with pinned versions first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

# Tiny models run faster on one thread than on two.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint format clean

demo: $(VENV)/.ready
	$(BIN)/tamis demo --output_dir demo

test: lint
	$(BIN)/python -m pytest -n logical tests

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .mypy_cache
