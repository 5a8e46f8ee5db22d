# What a person types. `make` alone lists it.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test bench fuzz faults share-check experiments compare lock audit licences

# To choose on the command line, as in `make demo PYTHON=python3.12`:
PYTHON ?=
LOCK ?= requirements.lock
WORKERS ?= 2

# What runs here is the environment's, in whatever shell `make` was typed. Without bytecode TensorFlow takes 15 seconds
# to import, so a wish not to write any ends here. MLflow reports nothing home.
unexport PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true

# Anything that needs the environment first asks tools/preflight.py whether it can be had, with the first Python that
# can run that script. If not, preflight has said why in one line, and `--question` makes `make` fail without a word more.
ifneq ($(filter venv demo test bench fuzz faults share-check experiments compare lock audit licences,$(MAKECMDGOALS)),)
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

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

venv: .venv/project  ## make .venv from requirements.lock (GPU: LOCK=requirements-gpu.lock), if it is not there whole

demo: venv  ## the whole pipeline on the embedded smears, then what it found
	@dvc repro ensemble_apl_healthy
	@python tools/demo_summary.py

test: venv  ## format, lint, types and the whole test suite, on WORKERS=2 processes
	ruff format --check
	ruff check
	mypy
	pytest -n $(WORKERS) --dist worksteal

bench: demo  ## speed, memory, another laboratory, beside what one would do otherwise; writes benchmarks/results/
	@python benchmarks/tuning.py
	@python benchmarks/shift.py
	@python benchmarks/scale.py

fuzz: venv  ## 20,000 damaged tables, 5,000 damaged pictures, and bombs: what becomes of each (half an hour)
	@python benchmarks/fuzz.py

faults: venv  ## 50 kills, full disks, flipped bits, servers that stop (root sees more cases); a table at the end
	@python benchmarks/faults.py

share-check: venv  ## what is wrong with the place that outs are shared by, if anything (REMOTE=name)
	@aplsmear share-check $(REMOTE)

experiments: venv  ## which experiment is better: what each changed, and its AUROC
	@aplsmear experiments

compare: venv  ## one offline page on how experiments or commits differ (A=... B=... C=...)
	@aplsmear compare $(A) $(B) $(C)

# One version of each package for every Python, so that none gives other numbers than another.
RESOLVE := uv pip compile pyproject.toml --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
  --override requirements.overrides --no-header --no-annotate --quiet $(UPGRADE)
lock: venv  ## bring both lock files in line with pyproject.toml (newest versions of all: UPGRADE=--upgrade)
	$(RESOLVE) --extra dev --output-file requirements.lock
	$(RESOLVE) --extra dev --extra gpu --constraints requirements.lock --output-file requirements-gpu.lock

# Tools of their own, in environments of their own: what they are asked about is the lock file and .venv.
audit: venv  ## known vulnerabilities of all that the lock file pins (asks osv.dev)
	@uvx --quiet pip-audit==2.10.1 --requirement $(LOCK) --require-hashes --disable-pip --vulnerability-service osv

licences: venv  ## the licence of every package in .venv
	@uvx --quiet pip-licenses==5.5.5 --python .venv/bin/python --from=mixed --order=license --with-urls

# The environment is made whole or not at all: the stamp comes last, and where it is missing all is made anew, because
# an installation that was cut off, or one for another lock, cannot be told from a good one by pip. Downloads go next to it,
# since /tmp may be small. Setuptools goes first: with it, the one package that has no wheel is built from pinned parts too.
# Bytecode is made on all cores at the end; what some packages bring for other Pythons has none, and needs none.
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile
$(STAMP):
	@echo "Making .venv from $(LOCK): 1 GB to download, then about 3 minutes. Later runs skip this."
	@"$(BASE_PYTHON)" -m venv --clear .venv
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
