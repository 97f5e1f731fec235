# Everything a fresh clone needs: Python 3.11+ with pip, and a package index.
#
#   make demo        prompts to report on SmolLM2-135M (run-time dependencies only, no torch); DEMO_OUT=demo
#   make test        all tests;  make test-fast leaves out the slow ones;  ARGS="-k name" is passed on to pytest
#   make check       format, lint, types, imports between rooms: what CI runs
#   make format      let ruff rewrite what it can
#   make clean       remove the environments

PYTHON ?= python3
DEMO_OUT ?= demo
ARGS ?=
# glibc keeps what a step frees for the next one, in large pages: docs/training.md, "On a CPU"; other systems do not read these
KEEP_MEMORY := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000
# Whole files go to a worker, so that what a file's tests share is made once. The fast set took 229 s on 2 cores that other
# jobs used too, which count as 70 to 110 s of quiet ones. Files go out in the order of tests/conftest.py, the longest first;
# xdist's own order, by the number of tests, would begin them last.
PYTEST = $(KEEP_MEMORY) $(DEV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

comma := ,
RUN := .venv
DEV := .venv-dev
CODE := src tests benchmarks recipes
SOURCES := pyproject.toml constraints.txt requirements-nodeps.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast check format clean

help:
	@sed -n '3,8s/^#   //p' Makefile

# A stamp says that its environment is whole. It is removed before an install and set after it, so an environment without a
# stamp was interrupted and is made anew (half a package looks installed to pip), and one with an old stamp is updated in place.
# $(1) environment, $(2) what pip installs from this folder, $(3) requirement files that go without their dependencies
define install
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -e $(1)/installed || $(PYTHON) -m venv --clear $(1)
	rm -f $(1)/installed
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '$(2)'
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(addprefix --requirement=,$(3))
	touch $(1)/installed
endef

$(RUN)/installed: $(SOURCES)
	$(call install,$(RUN),.[cpu],requirements-nodeps.txt)

$(DEV)/installed: $(SOURCES) requirements-nodeps-dev.txt
	$(call install,$(DEV),.[cpu$(comma)dev],requirements-nodeps.txt requirements-nodeps-dev.txt)

demo: $(RUN)/installed
	$(KEEP_MEMORY) $(RUN)/bin/dflash-jax demo --out $(DEMO_OUT)

test: $(DEV)/installed
	$(PYTEST) $(ARGS)

test-fast: $(DEV)/installed
	$(PYTEST) -m "not slow" $(ARGS)

check: $(DEV)/installed
	$(DEV)/bin/ruff format --check $(CODE)
	$(DEV)/bin/ruff check $(CODE)
	$(DEV)/bin/basedpyright --pythonpath $(DEV)/bin/python
	$(DEV)/bin/lint-imports --no-logo

format: $(DEV)/installed
	$(DEV)/bin/ruff format $(CODE)
	$(DEV)/bin/ruff check --fix $(CODE)

clean:
	rm -rf $(RUN) $(DEV)
