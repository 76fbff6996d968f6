# make train      set up, then train, test and report the default model
# make test       set up with the developers' tools, then run the tests
# make test-fast  a verdict on units in a minute and a half
# make lint       style, types and layers
# make gpu        checks and measurements on a GPU in ten minutes: runs/gpu/gpu.md (DEVICE=cpu tries it without one)
#
# PYTHON=python3.12 chooses the interpreter (3.11 or newer); ARGS="key=value …" goes to train.py or pytest.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip
# Python compiles what it imports; all that the libraries have would take half a minute.
INSTALL := $(PIP) install --no-compile --constraint constraints.txt
# Many container images forbid Python to keep what it has compiled, which more than doubles the time of each start.
export PYTHONDONTWRITEBYTECODE :=

# One thread per test process: the processes are the parallelism.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

.PHONY: train test test-fast lint gpu

train: $(VENV)/installed
	$(VENV)/bin/python train.py $(ARGS)

test: $(VENV)/installed-dev
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/installed-dev
	$(PYTEST) -m "not slow" $(ARGS)

gpu: $(VENV)/installed-dev
	$(VENV)/bin/python benchmarks/gpu/run.py --device $(or $(DEVICE),cuda) $(ARGS)

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

# The stamps make a second call install nothing, until the requirements change.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)
	$(INSTALL) --editable '.[weights]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --editable '.[weights,dev]'
	@touch $@

$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than Python 3.11; name a newer one with PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
