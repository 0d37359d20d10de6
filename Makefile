# `make` lists the targets. Each of them installs .venv first when it is missing or older than what defines it.

PY := .venv/bin/python
STAMP := .venv/.installed
# Versioned names can be shims for interpreters that are not there, hence the trial run.
PYTHON ?= $(shell if python3.11 -c '' 2>/dev/null; then echo python3.11; else echo python3; fi)
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check
# A machine without an NVIDIA GPU needs no particular build; one with a GPU takes what setup.py's range gives it.
TORCH ?= $(if $(shell command -v nvidia-smi),,torch==2.13.0)
# Processes that share the tests; each is single-threaded and takes about 2 GB.
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint fix types bench bench-head bench-generate bench-peers mutants size check

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with everything in it

$(STAMP): setup.py pyproject.toml $(wildcard csrc/*) $(wildcard requirements/*)
	@echo "Installing into .venv: a few minutes, several of them silent."
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(if $(TORCH),$(PIP_INSTALL) "$(TORCH)")
	$(PIP_INSTALL) --constraint requirements/constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP) ## train a small model from nothing and improve it with PPO (under 4 minutes)
	.venv/bin/fastppo demo --output_dir runs/demo

test: $(STAMP) ## the tests that need no GPU and little time
	$(PY) -m pytest -n $(JOBS) --dist loadfile -m "not gpu and not slow"

test-all: $(STAMP) ## every test that needs no GPU
	$(PY) -m pytest -n $(JOBS) --dist loadfile -m "not gpu"

lint: $(STAMP) ## style and format, checked only
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

fix: $(STAMP) ## style and format, mended where ruff can
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

types: $(STAMP) ## mypy --strict on the package
	.venv/bin/mypy

bench: $(STAMP) ## time a whole PPO iteration
	$(PY) -m benchmarks.step

bench-head: $(STAMP) ## time the loss head and the sampler, against the peers that `make bench-peers` has installed
	$(if $(wildcard .venv-head/bin/python),.venv-head/bin/python,$(PY)) -m benchmarks.head
	$(PY) -m benchmarks.sampling

bench-generate: $(STAMP) ## time generation, against transformers and, after `make bench-peers`, llama.cpp
	$(PY) -m benchmarks.generate

bench-peers: $(STAMP) ## make the environments of the libraries that the benchmarks compare with
	sh benchmarks/peers/install.sh

mutants: $(STAMP) ## put known bugs into a copy of the source: the tests must fail on each (long: C++ is built anew for many)
	$(PY) tests/mutations.py

size: $(STAMP) ## lines per file, held under the ceilings
	$(PY) tests/size.py

check: lint types test ## what to run before a commit
