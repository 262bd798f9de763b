# `make run` and `make test` are all a new machine needs; both create .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest

.PHONY: help run test test-all test-portable test-oldest test-pythons lint lab figures bench gpu-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 15

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("golfbook needs Python 3.11, 3.12 or 3.13, found " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.13") if not (3, 11) <= sys.version_info < (3, 14) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@

run: $(VENV)/.ready  ## train, quantise, score and plot the quickstart study on a CPU
	$(BIN)/golfbook run papermill_jobs/quickstart.yaml

test: $(VENV)/.ready lint  ## lint, types and all tests but the long ones
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-all: $(VENV)/.ready lint  ## every test, and make test-portable
	$(BIN)/python -m pytest -n 2
	$(MAKE) test-portable

test-portable: $(VENV)/.ready  ## the numerical tests under emulated processors, and some tests under another Python
	$(BIN)/python tests/portable.py
	$(BIN)/python tests/other_pythons.py

$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	sed -nE 's/^ +"([A-Za-z0-9_-]+)>=([0-9.]+)",$$/\1==\2/p' pyproject.toml > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[all]'
	@touch $@

test-oldest: $(OLDEST)/.ready  ## all tests but the long ones with the oldest packages that pyproject.toml admits
	$(OLDEST)/bin/python -m pytest -n 2 -m 'not slow'

test-pythons: $(VENV)/.ready  ## some tests under another Python of this machine, in an environment of its own
	$(BIN)/python tests/other_pythons.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: $(VENV)/.ready  ## open the notebooks in JupyterLab (loopback, with a token)
	$(BIN)/golfbook lab

figures: $(VENV)/.ready  ## make the README's figures again, from the quickstart study and the committed table of sizes
	$(BIN)/golfbook run papermill_jobs/quickstart.yaml
	$(BIN)/golfbook collect quickstart
	$(BIN)/papermill notebooks/13_size_quality.ipynb runs/13_size_quality.ipynb

bench: $(VENV)/.ready  ## run the benchmarks; each prints both sides
	@for f in tests/benchmarks/bench_*.py; do echo "== $$f"; $(BIN)/python $$f || exit 1; done

gpu-check: $(VENV)/.ready  ## equalities, speeds, scoring and a 200-step run on the CUDA device that is there, into one JSON
	$(BIN)/python tests/gpu_check.py

clean:  ## remove the environment and caches, not the runs
	rm -rf .venv* .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
