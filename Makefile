# Each target makes what it needs: an environment from the pinned constraints, then its job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow lint clean

demo: $(VENV)/.installed
	$(BIN)/python deploy/demo/docstrings.py --out runs/demo/data
	$(BIN)/adapeft run deploy/demo/demo.yaml model.name=$$($(BIN)/python deploy/demo/docstrings.py --print-model)

# One thread: for tiny tensors several wait for each other longer than they work. A file's tests share what they launch.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=5 --numprocesses 2 --dist loadfile

slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch by itself first: what comes after then takes this build and no other.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cluster,demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
