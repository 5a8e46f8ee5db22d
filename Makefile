# The commands for daily work; `make` alone lists them.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo lint test bench fuzz faults computers share-check experiments compare lock audit licences

# These can be set on the command line, as in `make demo PYTHON=python3.12`:
PYTHON ?=
LOCK ?= requirements.lock
WORKERS ?= 2

# Commands run in the environment .venv, whatever the user's shell has set. PYTHONDONTWRITEBYTECODE is unset because
# TensorFlow takes 15 seconds to import without bytecode. MLflow sends no usage data.
unexport PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
# DVC needs a home and a name; the user of a container may have none.
export HOME ?= /tmp
export LOGNAME := $(firstword $(LOGNAME) $(USER) $(shell { id -un || id -u; } 2>/dev/null) user)

# Targets that need the environment first run tools/preflight.py, by the first Python that can run it. If the environment
# cannot be made, preflight prints the reason in one line, and `--question` makes `make` fail without another message.
ifneq ($(filter venv demo lint test bench fuzz faults computers share-check experiments compare lock audit licences,$(MAKECMDGOALS)),)
PREFLIGHT := $(shell \
  for python in python3 python3.13 python3.12 python3.11 python; do \
    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 6))' 2>/dev/null; then \
      exec $$python tools/preflight.py --python "$(PYTHON)" --lock "$(LOCK)"; \
    fi; \
  done; \
  echo "No Python 3 is installed: install one, on Debian and Ubuntu with 'apt-get install python3 python3-venv'." >&2)
ifeq ($(PREFLIGHT),)
MAKEFLAGS += --question
endif
STAMP := .venv/$(or $(firstword $(PREFLIGHT)),not-to-be-had)
BASE_PYTHON := $(wordlist 2,99,$(PREFLIGHT))
endif

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

venv: .venv/project  ## make .venv from requirements.lock, unless it is complete (GPU: LOCK=requirements-gpu.lock)

demo: venv  ## run the pipeline on the embedded smears, then print the results
	@dvc repro answer
	@python tools/demo_summary.py

lint: venv  ## check format, style and types
	ruff format --check
	ruff check
	mypy

test: lint  ## the same, then run all tests in WORKERS=2 processes
	pytest -n $(WORKERS) --dist worksteal

bench: demo  ## measure speed, memory and results in other laboratories; write benchmarks/results/
	@python benchmarks/tuning.py
	@python benchmarks/shift.py
	@python benchmarks/forward.py
	@python benchmarks/scale.py

fuzz: venv  ## try 20,000 damaged tables, 5,000 damaged images and decompression bombs (half an hour)
	@python benchmarks/fuzz.py

faults: venv  ## try 50 kills, full disks, flipped bits, servers that stop (as root: more cases); print a table
	@python benchmarks/faults.py

computers: venv  ## test whether this processor and those that qemu-user emulates give the same bytes; print a table
	@python benchmarks/computers.py

share-check: venv  ## test the DVC remote: write, read and delete a small object there (REMOTE=name)
	@aplsmear share-check $(REMOTE)

experiments: venv  ## print what each experiment changed, and its AUROC
	@aplsmear experiments

compare: venv  ## write one page about the differences of experiments or commits (A=... B=... C=...)
	@aplsmear compare $(A) $(B) $(C)

# One version of each package for every Python, so that all of them give the same numbers.
RESOLVE := uv pip compile pyproject.toml --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
  --override requirements.overrides --no-header --no-annotate --quiet $(UPGRADE)
lock: venv  ## update both lock files after a change of pyproject.toml (all packages: UPGRADE=--upgrade)
	$(RESOLVE) --extra dev --extra slides --output-file requirements.lock
	$(RESOLVE) --override requirements-gpu.overrides --extra dev --extra slides --extra gpu --constraints requirements.lock \
	  --output-file requirements-gpu.lock

# uvx runs these tools in environments of their own; they examine the lock file and .venv.
audit: venv  ## list known vulnerabilities of the packages in the lock file (asks osv.dev)
	@uvx --quiet pip-audit==2.10.1 --requirement $(LOCK) --require-hashes --disable-pip --vulnerability-service osv

licences: venv  ## list the licence of every package in .venv
	@uvx --quiet pip-licenses==5.5.5 --python .venv/bin/python --from=mixed --order=license --with-urls

# The environment is made whole or not at all. The stamp comes last; without it all is made anew, because pip cannot
# tell an installation that was cut off, or one from another lock file, from a good one. Only what `make` has made is
# deleted (the mark `made-by-make`): tools/preflight.py refuses a .venv of another tool. Downloads go into .venv, since
# /tmp may be small. Setuptools comes first: the one package without a wheel is built with it, from pinned parts too.
# Bytecode is compiled on all cores at the end; files for other versions of Python do not compile, and need not.
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile
$(STAMP):
	@echo "Making .venv from $(LOCK): 1 GB to download, then about 3 minutes. Later runs skip this."
	@mkdir -p .venv && touch .venv/made-by-make
	@find .venv -mindepth 1 -maxdepth 1 ! -name made-by-make -exec rm -rf {} +
	@"$(BASE_PYTHON)" -m venv .venv
	@mkdir .venv/tmp
	@sed -n '/^setuptools==/,/[^\\]$$/p' $(LOCK) > .venv/tmp/setuptools.lock
	@export TMPDIR="$(CURDIR)/.venv/tmp"; \
	  $(PIP) --require-hashes -r .venv/tmp/setuptools.lock && \
	  $(PIP) --require-hashes --no-build-isolation --use-pep517 -r $(LOCK)
	@rm -r .venv/tmp
	@.venv/bin/python -m compileall -q -j 0 .venv/lib > /dev/null || true
	@touch $@

.venv/project: $(STAMP) pyproject.toml
	@$(PIP) --no-build-isolation --editable .
	@touch $@
