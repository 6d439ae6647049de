# Each target makes what it needs: an environment from the pinned constraints, then its job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo check test slow lint results docs clean

demo: $(VENV)/.installed
	$(BIN)/python deploy/demo/docstrings.py --out runs/demo/data
	$(BIN)/adapeft run deploy/demo/demo.yaml model.name=$$($(BIN)/python deploy/demo/docstrings.py --print-model)

# One thread: for tiny tensors several threads wait for each other longer than they work. The tests of a file share what
# they launch.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
ON_TWO_CORES := --numprocesses 2 --dist loadfile

check: lint
	$(PYTEST) $(ON_TWO_CORES) -m "not slow and not gpu and not ranks and not ray"

test: lint
	$(PYTEST) $(ON_TWO_CORES) --durations=5

slow: $(VENV)/.installed
	$(PYTEST) -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Repeats the runs behind a page of tests/benchmarks/results: make results PAGE=stsb
results: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks.reproduce $(PAGE)

docs: $(VENV)/.installed
	$(BIN)/python .docs/build.py

# torch by itself first: what comes after then takes this build and no other.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cluster,demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
