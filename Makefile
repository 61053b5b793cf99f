# Every target makes and uses .venv; PYTHON=python3 uses that interpreter as it is instead.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench check-cuda gpu lint clean

ifdef PYTHON
READY :=
GPU_PYTHON ?= $(PYTHON)
else
PYTHON := .venv/bin/python
READY := .venv/ready
endif
BASE_PYTHON ?= python3
# Has a PyTorch with CUDA, and is used as it is.
GPU_PYTHON ?= python3
# Any PyTorch from 2.10 on; this is the one that is tested.
TORCH ?= torch==2.13.0
RUN := $(PYTHON) -m recsys_ops
# The modules of tests, several at a time.
PYTEST := $(PYTHON) -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadscope

help: ## list the targets
	@awk -F': .*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/ready: pyproject.toml setup.py $(wildcard $(addprefix csrc/,*.cpp */*.cpp */*.h */*.cu */*.cuh */*/*))
	test -x .venv/bin/python || $(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet "setuptools>=77" wheel "$(TORCH)"
	.venv/bin/python -m pip install --quiet --no-build-isolation --editable ".[triton,dev]"
	touch $@

# What is tested with and measured against where it can be installed, and left out where it cannot.
.venv/peers: .venv/ready
	-.venv/bin/python -m pip install --quiet "$(TORCH)" "recsys-ops[torchrec]" && \
		.venv/bin/python -m pip install --quiet --no-deps torchrec==1.8.0
	touch $@

demo: $(READY) ## train, accelerate and compare recommenders on real data
	$(RUN) demo

test: $(READY) $(READY:ready=peers) ## the fast tests, and in CI a share of the slow ones that changes daily
	$(PYTEST) --slow=$(if $(CI),share,none)

test-all: $(READY) $(READY:ready=peers) ## every test
	$(PYTEST) --slow=all

bench: $(READY) $(READY:ready=peers) ## measure every operator against its peers
	$(RUN) bench --json bench.json --html bench.html

check-cuda: $(READY) ## compile the CUDA kernels for every GPU, with any PyTorch
	$(PYTHON) setup.py -q check_cuda

gpu: ## build, verify, sanitize, measure on this machine's GPU in ten minutes; PARTS="verify bench" for some
	@$(GPU_PYTHON) -m recsys_ops.benchmarks.gpu $(PARTS)

lint: $(READY) ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

clean: ## remove what was built
	rm -rf .venv build dist *.egg-info recsys_ops/*.so recsys_ops/_build_info.py demo-report
