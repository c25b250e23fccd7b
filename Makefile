# make demo | test | bench | lint | docs | clean: each does its own set-up; needs only python3 (3.10 or newer) and gcc.
# PYTHON=... picks the interpreter; one that already has torch 2.11 or newer is reused, offline.

PYTHON ?= python3
VENV   ?= .venv
VERL   ?= .venv-verl
VLLM   ?= .venv-vllm
PY     := $(VENV)/bin/python
SHELL  := /bin/bash
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)

RECIPE  ?= recipes/demo.yaml
TESTS   ?= tests
# Processes that share the tests, one thread each; 1: one process with all threads.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py
SETUP   := pyproject.toml tools/environment.py
.DELETE_ON_ERROR:

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

demo: $(VENV)/.demo $(VENV)/.built ## watch a 135M-parameter model learn with gradient-guided exploration (3 minutes)
	$(VENV)/bin/g2rl train $(RECIPE) $(ARGS)
	@echo "  (g2rl is $(VENV)/bin/g2rl; 'source $(VENV)/bin/activate' puts it on the path)"

test: $(VENV)/.dev $(VENV)/.built ## all tests; TESTS=tests/head/test_head.py ARGS="-k bias" narrows them
	@if [ "$(WORKERS)" -gt 1 ] && $(PY) -c "import xdist" 2>/dev/null; then \
	  set -- -n "$(WORKERS)"; export OMP_NUM_THREADS=1; fi; \
	  set -x; $(PY) -m pytest "$$@" $(TESTS) $(ARGS)

test-verl: $(VERL)/.skyrl $(VERL)/.built ## tests of the verl and SkyRL integrations, in .venv-verl: TRL needs other versions
	OMP_NUM_THREADS=1 $(VERL)/bin/python -m pytest tests/verl tests/skyrl $(ARGS)

test-vllm: $(VLLM)/.vllm $(VLLM)/.built ## tests of `g2rl eval --engine vllm`, in .venv-vllm (3 GB): vLLM on the CPU
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm_engine $(ARGS)

test-trl: $(VENV)/.dev $(VENV)/.built ## every option of TRL's GRPOConfig, with GRPOTrainer beside G2RLTrainer
	OMP_NUM_THREADS=1 $(PY) -m pytest -n "$(WORKERS)" -m "slow or not slow" tests/trl_options $(ARGS)

bench: $(VENV)/.dev $(VENV)/.built ## speed, memory, error of the head op; OP=group or OP=train: those; ARGS="--help"
	$(VENV)/bin/g2rl bench $(or $(OP),head) $(ARGS)

evidence: $(VENV)/.dev $(VENV)/.built ## rerun every experiment of docs/evidence.md (hours; ARGS=--quick: minutes)
	$(PY) -m benchmarks.learning.evidence $(ARGS)

lint: $(VENV)/.dev $(VENV)/.built ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(VENV)/.dev $(VENV)/.built ## the API reference, in build/docs
	$(PY) -m sphinx -W --keep-going -b html docs build/docs

build: $(VENV)/.dev $(VENV)/.built ## the environment and the extension; runs nothing

wheel: ## pip install . with build isolation, in a fresh environment elsewhere, then import from another folder
	@PYTHON="$(PYTHON)" tools/check_install.sh

hub-kernel: $(VENV)/.dev $(VENV)/.built ## a repository for the Hugging Face Hub in build/hub-kernel, checked with `kernels`
	$(PY) tools/hub_kernel.py --check $(ARGS)

wheels: ## dist/: a tested wheel for any Linux with glibc 2.28, for each Python; PYTHONS="python3.12 ..." picks them
	@$(PYTHON) tools/wheels.py $(PYTHONS) $(ARGS)

oldest: $(VENV)/.dev $(VENV)/.built ## a wheel built with the headers of torch 2.11, tested with the installed torch
	tools/check_oldest.sh $(PY)

matrix: $(VENV)/.dev $(VENV)/.built ## tests of the ops on each Python and torch (hours, gigabytes); ARGS="--help"
	$(PY) tools/matrix.py $(ARGS)

clean: ## remove builds and environments; runs/ stays
	rm -rf build dist *.egg-info $(VENV) $(VERL) $(VLLM) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f g2rl_kernels/*.so

# Three environments: the project's, where dev adds to demo, verl's and vLLM's.
$(VENV)/.demo: EXTRAS := demo
$(VENV)/.dev:  EXTRAS := demo,trl,dev
$(VENV)/.demo $(VENV)/.dev: constraints.txt
$(VERL)/.verl: EXTRAS := verl,test constraints-verl.txt
$(VERL)/.verl: constraints-verl.txt
$(VLLM)/.vllm: EXTRAS := pinned constraints-vllm.txt
$(VLLM)/.vllm: constraints-vllm.txt
$(VENV)/.demo $(VENV)/.dev $(VERL)/.verl $(VLLM)/.vllm: $(SETUP)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo \
	  "g2rl-kernels needs Python 3.10 or newer; '$(PYTHON)' is older or missing: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@command -v c++ >/dev/null || { echo "g2rl-kernels needs a C++ compiler: install g++ 10 or newer"; exit 1; }
	@$(PYTHON) tools/environment.py $(@D) $(EXTRAS)
	@touch $@ $(@D)/.demo $(@D)/.built

$(VERL)/.skyrl: tests/skyrl/requirements.txt $(VERL)/.verl
	@$(VERL)/bin/python -m pip install -q --no-deps -r $<
	@touch $@

# The set-up builds the extension; this rebuilds it after a change of sources.
%/.built: $(SOURCES)
	@$(@D)/bin/python setup.py -q build_ext --inplace > $(@D)/build.log 2>&1 || { tail -n 40 $(@D)/build.log; exit 1; }
	@touch $@

.NOTPARALLEL:
.PHONY: help demo test test-verl bench evidence lint docs build wheel hub-kernel wheels oldest matrix test-vllm test-trl clean
