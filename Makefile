# Every target but `clean` works on a fresh machine: Python >= 3.11, make and pip are all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
BENCH ?= brax/hopper playground/CheetahRun playground/HopperHop playground/HumanoidRun
RESULTS := experiments/benchmarks/results

.PHONY: help install train test test-slow test-pod lint format bench results docs clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## the pinned versions into .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "rlx needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make install PYTHON=python3.11" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@# It asks for an orbax-checkpoint older than ours, and for much else that converting policies does not take.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps jax2onnx
	@touch $@

train: install  ## PPO on playground/CheetahRun, into a new folder of runs/
	$(BIN)/rlx train ppo playground/CheetahRun

test: install  ## everything that is not slow
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: install  ## learning and reproduction
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "slow and not pod"

test-pod: install  ## runs of two and four processes, stopped and killed
	$(BIN)/python -m pytest -m pod

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## rewrites what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## steps/s, compile time and memory on every physics engine, into experiments/benchmarks/results/
	@mkdir -p $(RESULTS)
	@for env in $(BENCH); do $(BIN)/rlx benchmark $$env ppo --out $(RESULTS)/$$(echo $$env | tr / -)-ppo.json || exit 1; done

results: install  ## the results in README and docs, out of the reports in experiments/
	$(BIN)/python experiments/results_table.py

docs: install  ## the site, into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## removes caches and the installation, never runs/
	rm -rf $(VENV) .jax_cache .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
