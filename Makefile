# Everything a contributor runs. `make demo` and `make test` need python3 (3.11 or later) and set up the rest in .venv.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SLIDE_STAMP := $(VENV)/.installed-slide

# Two test workers share the machine, so each computes with one thread.
JOBS ?= 2
PYTEST_ARGS ?=
# The lowest torch that pyproject.toml names, and its environment. FLOOR_PIP: further arguments of pip, such as an index
# of CPU builds.
FLOOR ?= $(shell sed -n 's/^dependencies = .*"torch>=\([0-9.]*\).*/\1/p' pyproject.toml)
FLOOR_VENV ?= .venv-floor
FLOOR_PIP ?=
FLOOR_TESTS ?= tests/core tests/kernels tests/models tests/ring tests/streaming
# Arguments of `make fuzz`, `make chaos` and `make mutants`.
FUZZ ?=
CHAOS ?=
MUTANTS ?=
# `make fuzz SECONDS=60`. Bash has a variable of this name too, which counts, so it is taken from the command line alone.
SECONDS_OF_FUZZ := $(if $(filter command line,$(origin SECONDS)),$(SECONDS),600)
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Material prints a notice about MkDocs 2 otherwise.
export NO_MKDOCS_2_WARNING := 1

# $(call step,name,command): runs the command under a heading and prints how long it took; a failure ends the target.
step = @printf '\n== %s\n' '$(1)'; TIMEFORMAT='== $(1): %1R s'; time $(2)

.PHONY: help venv demo test test-floor fuzz chaos mutants lint format types docs docs-test figures tables hf-sweep slide slide-volume slide-demo bench-cpu bench-compare bench-test dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## make .venv with everything the other targets need

# The recipe is redone when what it installs may have changed. The package itself is installed editable.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	    echo "error: expected Python 3.11 or later as '$(PYTHON)', found none. On Debian: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: expected Python 3.11 or later, '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@# Debian ships python3 without ensurepip; python3-venv brings it.
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    rm -rf $(VENV); \
	    if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	        $(PYTHON) -m venv $(VENV); \
	    elif $(PYTHON) -m virtualenv --version >/dev/null 2>&1; then \
	        $(PYTHON) -m virtualenv -q $(VENV); \
	    elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        echo "installing python3-venv"; \
	        apt-get update -qq; \
	        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null; \
	        $(PYTHON) -m venv $(VENV); \
	    else \
	        echo "error: '$(PYTHON)' cannot make a virtual environment. Install its venv package (Debian: apt-get install python3-venv) and try again." >&2; \
	        exit 1; \
	    fi; \
	fi
	@echo "installing into $(VENV) (a few minutes the first time)"
	@# hatchling comes first so that the build needs no isolated environment, whose contents nothing would pin. Of what is
	@# installed most is never imported, so each is compiled when it is.
	@TIMEFORMAT='== venv: %1R s'; time { \
	    $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt hatchling; \
	    $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt --no-build-isolation \
	        -e '.[dev]'; \
	    $(BIN)/python -m pip check; }
	@touch $@

demo: $(STAMP) ## train the demo model (five minutes on two cores) into runs/demo
	$(BIN)/dilated-attention train --preset demo --out runs/demo

test: $(STAMP) ## run every check, cheap ones first
	$(call step,ruff check,$(BIN)/ruff check .)
	$(call step,ruff format,$(BIN)/ruff format --check .)
	$(call step,mypy,$(BIN)/mypy)
	$(call step,docs,$(BIN)/mkdocs build --strict --quiet)
	$(call step,pytest,$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS))

# Its own environment: torch is taken at FLOOR's newest patch, everything else as pinned.
test-floor: ## the CPU tests on the lowest torch that the metadata allows, where pip finds it (another one: FLOOR=2.10)
	@$(FLOOR_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(FLOOR_VENV)
	@$(FLOOR_VENV)/bin/python -m pip install -q --disable-pip-version-check $(FLOOR_PIP) 'torch==$(FLOOR).*' \
	    2>$(FLOOR_VENV)/pip.log || { \
	    grep -Eq 'No matching distribution found|ResolutionImpossible' $(FLOOR_VENV)/pip.log || { \
	        cat $(FLOOR_VENV)/pip.log >&2; exit 1; }; \
	    echo "error: expected torch $(FLOOR), pip finds none for this Python and platform: the lowest torch was not tested" >&2; \
	    exit 3; }
	@grep -vE '^(torch|triton)==' constraints.txt >$(FLOOR_VENV)/constraints.txt
	@$(FLOOR_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(FLOOR_VENV)/constraints.txt hatchling
	@$(FLOOR_VENV)/bin/python -m pip install -q --disable-pip-version-check $(FLOOR_PIP) -c $(FLOOR_VENV)/constraints.txt \
	    --no-build-isolation -e '.[cli,viz]' pytest pytest-xdist hypothesis hilbertcurve triton
	$(call step,pytest on torch $(FLOOR),$(ONE_THREAD) $(FLOOR_VENV)/bin/python -m pytest -n $(JOBS) $(FLOOR_TESTS) $(PYTEST_ARGS))

fuzz: $(STAMP) ## draw calls of every public function for SECONDS=600; prints the seed, what failed, and a count
	PYTHONPATH=tests:tests/helpers $(ONE_THREAD) $(BIN)/python -m fuzz --seconds $(SECONDS_OF_FUZZ) $(FUZZ)

chaos: $(STAMP) ## kill 60 commands, damage files in every known way, fill disks; CHAOS="--kills 10 --seed 1" for others
	PYTHONPATH=.:tests $(ONE_THREAD) $(BIN)/python -m chaos $(CHAOS)

mutants: $(STAMP) ## change the package in 100 small ways, each of which a test has to notice; MUTANTS="--seed 1"
	PYTHONPATH=.:tests $(ONE_THREAD) $(BIN)/python -m mutants $(MUTANTS)

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy, strict, on the package
	$(BIN)/mypy

docs: $(STAMP) ## build the site into site/, warnings are errors
	$(BIN)/mkdocs build --strict

figures: $(STAMP) ## draw docs/img anew from DilatedPattern
	$(BIN)/python docs/figures.py

tables: $(STAMP) ## write the tables of README and docs anew from benchmarks/results and from the code
	$(BIN)/python docs/tables.py

hf-sweep: $(STAMP) ## try every class of the installed transformers (a minute and a half), and write its table
	$(ONE_THREAD) $(BIN)/python docs/huggingface_classes.py
	$(BIN)/python docs/tables.py hf-classes

docs-test: $(STAMP) ## run every code block of README and docs, every example and every notebook
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) tests/project/test_docs.py tests/project/test_doors.py tests/project/test_examples.py tests/project/test_notebooks.py $(PYTEST_ARGS)

bench-test: $(STAMP) ## the tests that judge a time; needs a quiet machine
	$(ONE_THREAD) $(BIN)/python -m pytest -m timing $(PYTEST_ARGS)

bench-compare: $(STAMP) ## this tree against BASE=<revision>, interleaved; fails on a regression over 5%
	$(BIN)/python -m benchmarks compare $(or $(BASE),HEAD)

slide: $(SLIDE_STAMP) ## train one probe on a slide of sample images along four orders, into runs/slide
	$(BIN)/python examples/slide --data images --out runs/slide

slide-volume: $(SLIDE_STAMP) ## the same in 3-D, on the MNI152 brain, into runs/slide-volume
	$(BIN)/python examples/slide --data mni152 --out runs/slide-volume

slide-demo: $(SLIDE_STAMP) ## slides from nothing: feature files of sample images, embeddings, a tuned model, a map
	$(BIN)/python examples/slide_demo.py --out runs/slide-demo

# What the slide jobs alone need (scikit-image, nilearn and what those bring) is no part of `make venv`.
$(SLIDE_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[slide]'
	@touch $@

bench-cpu: $(STAMP) ## time the CPU path against attention calls alone
	$(BIN)/python benchmarks/cpu.py

dist: $(STAMP) ## build the wheel and the source archive into dist/
	rm -rf dist
	$(BIN)/python -m hatchling build

clean: ## remove builds, caches and the environment; runs/ is kept
	rm -rf $(VENV) $(FLOOR_VENV) dist build site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
