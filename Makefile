SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
STUBS := client/hibug2/v1

.PHONY: help
help: ## Lists the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml client/pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ./client -e '.[dev]'
	$(PY) -m services.enumeration.warm
	touch $@

.PHONY: setup
setup: $(VENV)/.installed ## Makes .venv with everything but torch

.PHONY: demo
demo: setup ## Finds, explains and repairs the error slices of a real model on real images
	$(PY) -m deploy.local.demo

.PHONY: test
test: setup ## Runs all tests
	$(PY) -m pytest

.PHONY: lint
lint: setup ## ruff, import walls, buf lint and breaking, generated code, Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/buf lint proto
	$(BIN)/buf format proto --diff --exit-code
	deploy/tools/breaking.sh $(BIN)/buf
	$(MAKE) --no-print-directory proto STUBS=.tools/stubs/hibug2/v1
	diff -r -x __pycache__ -x __init__.py .tools/stubs/hibug2/v1 client/hibug2/v1
	$(BIN)/hadolint deploy/images/Dockerfile tests/deploy/others.Dockerfile

.PHONY: types
types: setup ## mypy, strict
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases tests/deploy/test_cluster.py

.PHONY: format
format: setup ## Formats code and contract
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format proto -w

.PHONY: proto
proto: setup ## Generates the stubs from proto/
	mkdir -p $(STUBS) && rm -f $(STUBS)/*_pb2*
	PATH="$(BIN):$$PATH" $(PY) -m grpc_tools.protoc -I proto \
	  --python_out=$(STUBS)/../.. --grpc_python_out=$(STUBS)/../.. \
	  --mypy_out=quiet:$(STUBS)/../.. --mypy_grpc_out=quiet:$(STUBS)/../.. \
	  proto/hibug2/v1/*.proto

.PHONY: lock
lock: ## Writes constraints.txt; versions in it stay while they fit (delete the file to take the newest of all)
	rm -rf .tools/lock && python3 -m venv .tools/lock
	.tools/lock/bin/pip install --quiet --disable-pip-version-check uv
	printf '%s\n' '-e ./client' '-e .[dev,gs]' | .tools/lock/bin/uv pip compile - --quiet --no-header --no-annotate \
	  --python-version 3.11 --no-emit-package hibug2 --no-emit-package hibug2-platform --output-file constraints.txt

$(VENV)/.rivals: $(VENV)/.installed tests/load/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/load/requirements.txt
	touch $@

.PHONY: bench
bench: setup $(VENV)/.rivals ## Measures the enumeration against its rivals; writes docs/results.md
	$(PY) -m tests.load.bench_enumeration

.PHONY: bench-slices
bench-slices: setup $(VENV)/.rivals ## Measures which slices are found and which are luck; writes docs/results.md
	$(PY) -W ignore -m tests.load.bench_slices

.PHONY: bench-tagging
bench-tagging: setup ## Measures the tagging fleet against a model that answers after 300 ms; writes docs/results.md
	$(PY) -m tests.load.bench_tagging

.PHONY: bench-repair
bench-repair: setup ## Proves what picking by error slices brings, beside its rivals; writes docs/results.md
	$(PY) -m tests.load.bench_repair

.PHONY: load
load: setup ## Measures many readers of a million slices; writes docs/results.md
	$(PY) -m tests.load.load_slices

$(VENV)/.llm: $(VENV)/.installed tests/llm/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/llm/requirements.txt
	touch $@

.PHONY: test-llm
test-llm: setup $(VENV)/.llm ## Asks a small local language model what the prompts ask; writes docs/results.md
	$(PY) -m tests.llm.ask_local

.PHONY: prompts
prompts: setup ## Writes what the prompts say to tests/golden; a changed prompt needs a raised revision
	$(PY) -m tests.golden.renders

.PHONY: up
up: setup ## Starts the local stack in the background; CONTAINERS=1: as containers, where an engine is there
	$(PY) -m deploy.local up $(if $(CONTAINERS),--containers)

.PHONY: down
down: setup ## Stops the local stack
	$(PY) -m deploy.local down

BASE ?= python:3.11-slim
TAG ?= 0.1.0
REGISTRY ?=
EXTRAS ?= s3,tls,traces

.PHONY: images
images: setup ## Builds the image of every service with podman or docker (BASE, TAG, REGISTRY, EXTRAS) and prints sizes
	$(PY) -m deploy.images.build --base $(BASE) --tag $(TAG) --registry "$(REGISTRY)" --extras $(EXTRAS)

.PHONY: chart
chart: setup ## Writes the chart's table of values, and the settings that its schema knows
	$(PY) -m deploy.tools.chart

.PHONY: test-deploy
test-deploy: setup ## Builds and runs the images, tests alerts and chart; prints times and sizes (minutes)
	deploy/tools/engine.sh
	HIBUG2_TEST_DEPLOY=1 $(PY) -m pytest tests/chart tests/deploy -s --durations 10

.PHONY: sizing
sizing: setup ## Measures images and slices a second and core, and what a million instances take; writes docs/operations.md
	$(PY) -m tests.deploy.sizing

.PHONY: cluster-test
cluster-test: setup ## Installs the chart in a cluster of yours (KUBECONTEXT, REGISTRY, TAG), breaks it, and looks what is lost
	KUBECONTEXT="$(KUBECONTEXT)" REGISTRY="$(REGISTRY)" TAG="$(TAG)" $(PY) -m pytest tests/deploy/test_cluster.py -s -rs
