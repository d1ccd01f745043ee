# Works with make 3.81 and any POSIX shell. The first target that needs it makes .venv; `make help` lists all.
VENV ?= .venv
JOBS ?= 2
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# macOS: tests fork
export OBJC_DISABLE_INITIALIZE_FORK_SAFETY := YES
# one thread per process: bits depend on the number of threads, and two busy pools on two cores are slower than one each
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest
# files in their order, not by their number of tests: the last ones are short
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

# the first Python of at least 3.11 that truly starts and can make environments
FIND_PYTHON := for p in $${PYTHON:-python3.12 python3.11 python3.13 python3.14 python3 python}; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done

BENCHMARKS := $(filter-out __init__ common,$(basename $(notdir $(wildcard benchmarks/*.py))))

.PHONY: help quickstart test faults test-slow test-gpu check bench
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

quickstart: $(STAMP) ## train both stages on the bundled images; results in runs/quickstart (8 minutes on two cores with AVX-512, 20 with AVX2)
	$(PY) -m pipelines.quickstart

test: $(STAMP) ## the tests of every change (4 minutes on two cores with AVX-512, 8 with AVX2)
	$(PYTEST) $(PARALLEL) -m "not slow and not faults and not gpu"

faults: $(STAMP) ## several processes train as one; crashes, damage, bad ranks (at most 6 minutes)
	$(PYTEST) $(PARALLEL) -m "faults and not slow and not gpu"

test-slow: $(STAMP) ## long tests: more kills, an empty-environment installation
	$(PYTEST) -m "slow and not gpu"

test-gpu: $(STAMP) ## what needs CUDA
	$(PYTEST) -m gpu

check: $(STAMP) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(STAMP) ## every benchmark; the last line of each is JSON
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(PY) -m "benchmarks.$$name"; done

$(STAMP): pyproject.toml constraints.txt
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
		echo "error: Python 3.11 or newer with venv was not found; install it, or name it: make PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	set -x; "$$python" -m venv $(VENV)
	$(PY) -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)
