# Two commands on a fresh machine with Python 3.11+ and make:
#   make demo    simulate a cohort, ingest it, pretrain, probe, report
#   make test    lint, types, import contracts and tests
#   make test-cluster    what needs Linux, root and some Debian packages: simulated clouds and test hosts
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo
# Processes that run tests side by side; JOBS=0 runs them in one.
JOBS ?= 2

.PHONY: setup demo test test-cluster lint bench bench-gpu clean

setup: $(VENV)/.ready

# The stamp is written last, so an interrupted installation is taken up again.
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python must be 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/physioray simulate $(DEMO)/source --subjects 40 --hours 0.75 --seed 0
	$(BIN)/physioray ingest $(DEMO)/source $(DEMO)/cohort
	$(BIN)/physioray info $(DEMO)/cohort
	$(BIN)/python experiments/quickstart.py --cohort $(DEMO)/cohort --out $(DEMO)/run --preset small --passes 10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -m "not cluster" -n $(JOBS) --dist loadgroup

# Debian: apt-get install openssh-server rsync iproute2 procps prometheus. What is missing is skipped, with its reason.
test-cluster: setup
	$(BIN)/python -m pytest tests/cluster -rs

# Without the run-time type checks of the tests, which would be measured too.
bench: setup
	$(BIN)/python -m pytest tests/benchmarks --run-benchmarks -s -o addopts="-q --strict-markers"

# The training step on a GPU; any Python with torch 2.11 or newer, pyarrow, scipy, jaxtyping and pytest will do.
bench-gpu:
	$(PYTHON) -m pytest tests/benchmarks/test_training_speed.py --run-benchmarks -s -rs -m gpu -o addopts=--strict-markers

clean:
	rm -rf $(DEMO) .pytest_cache .mypy_cache .ruff_cache
