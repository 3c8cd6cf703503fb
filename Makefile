# The commands of this repository; `make help` lists them. Needs only make, git and Python >= 3.11 with venv and pip.
#
# An activated virtual environment (VIRTUAL_ENV) is used as it is; otherwise everything lives in .venv.

PYTHON ?= python3
ARGS ?=

VENV := $(if $(wildcard $(VIRTUAL_ENV)/bin/python),$(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.llava-slt.stamp
# The stamp belongs to this checkout: an environment shared by two checkouts is set up again for the second one.
INSTALLED_FOR := $(shell cat "$(STAMP)" 2>/dev/null)
ifneq ($(INSTALLED_FOR),$(CURDIR))
FORCE_SETUP := force
endif

# torch is named in the same command: left to a dependency's range, pip may take another build of it.
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

SOURCES := shards pipeline launch tests benchmarks
# Two ranks share few cores in the tests, so one thread each; benchmarks and the demo choose their own. The many
# processes of the tests compile our modules once, also on machines where Python is told to keep no compiled files.
TEST_ENV := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=
# Triton kernels run on the CPU, slowly, where triton is installed; tests/gpu must not see this.
UNIT_ENV := $(TEST_ENV) TRITON_INTERPRET=1

# A test that hangs shows every thread's stack after a quarter of an hour instead of nothing until CI's own limit.
PYTEST := $(BIN)/python -m pytest -o faulthandler_timeout=900

# Unit tests are independent of each other. The rest start processes of their own, which wait for each other a third of
# the time: two files of them side by side.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile
TWO_LANES := -n 2 --dist loadfile
NOTHING_SELECTED := 5

# All unit tests, and then no `raise` may be left that none of them executed (tests/raises.py).
RAISES_MET := $(CURDIR)/.pytest_cache/raises-met
WATCHED_UNIT = rm -rf "$(RAISES_MET)" && $(UNIT_ENV) SLT_RAISES_MET="$(RAISES_MET)" $(PYTEST) $(PARALLEL) tests/unit && \
	$(BIN)/python -m tests.raises "$(RAISES_MET)"

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-ablations test test-fast cov test-gpu check format reference bench bench-peers drills soak clean force

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Create the environment and install everything, once

$(STAMP): pyproject.toml constraints.txt $(FORCE_SETUP)
	@test -x "$(BIN)/python" || $(PYTHON) -m venv "$(VENV)"
	@"$(BIN)/python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python >= 3.11 is needed, this is %s: make PYTHON=python3.11 (after rm -r .venv)" % sys.version.split()[0])'
	@echo "installing into $(VENV) (about two minutes the first time)"
	@"$(BIN)/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt torch==$(TORCH) -e '.[dev]'
	@echo "$(CURDIR)" > "$@"

demo: setup ## Generate a sign corpus, run the three stages on 2 CPU processes, evaluate, translate (ARGS=...)
	$(BIN)/slt demo $(ARGS)

demo-ablations: setup ## The demo with one stage left out at a time: what each is worth in BLEU (ARGS=...)
	$(BIN)/slt demo-ablations $(ARGS)

test: setup check ## Style, types and the whole test suite (ARGS="-k name" narrows it)
	$(if $(ARGS),$(UNIT_ENV) $(PYTEST) $(PARALLEL) tests/unit $(ARGS) || test $$? -eq $(NOTHING_SELECTED),$(WATCHED_UNIT))
	$(TEST_ENV) $(PYTEST) $(TWO_LANES) --ignore=tests/unit --durations=10 tests $(ARGS) || test $$? -eq $(NOTHING_SELECTED)

test-fast: setup ## Unit tests only
	$(UNIT_ENV) $(PYTEST) $(PARALLEL) tests/unit $(ARGS)

cov: setup ## Unit tests, and every `raise` of the library that none of them executes
	$(WATCHED_UNIT)

test-gpu: setup ## Tests that need a CUDA device
	HF_HUB_OFFLINE=1 $(PYTEST) -m gpu tests/gpu $(ARGS)

check: setup ## ruff, ruff format, mypy
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy shards pipeline launch

format: setup ## Apply ruff's fixes and formatting
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

reference: setup ## Write docs/recipe-reference.md from the recipe's types
	$(BIN)/python -m tests.unit.test_recipe_reference

bench-peers: setup ## The other loaders that ours is measured against, in an environment of their own (.peers)
	$(BIN)/python benchmarks/peers/environment.py

bench: setup ## Every benchmark this machine can run, quickly (one alone: python benchmarks/NAME.py)
	@"$(BIN)/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt torch==$(TORCH) -e '.[dev,bench]'
	@missed=; for file in $$(grep -l -e --quick benchmarks/*.py); do \
		echo "== $$file"; $(BIN)/python "$$file" --quick || missed="$$missed $$file"; done; \
		test -z "$$missed" || { echo "a target was missed, or a peer was absent:$$missed"; exit 1; }

drills: setup ## Every fault that clusters do to runs, on simulated hosts (root, Linux; ARGS="--only 'kill a rank'")
	$(TEST_ENV) $(BIN)/python benchmarks/drills.py --out benchmarks/receipts/drills.jsonl $(ARGS)

soak: setup ## One run through thirty random faults, against the same run left alone; about a quarter of an hour
	$(TEST_ENV) $(BIN)/python benchmarks/soak.py --out benchmarks/receipts/soak.jsonl $(ARGS)

clean: ## Remove caches and build outputs; environments and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) ds_configs -name __pycache__ -type d -prune -exec rm -rf {} +
