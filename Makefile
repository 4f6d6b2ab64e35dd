# Every target sets up .venv by itself. PYTHON is the interpreter the environment is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
STATE ?= state
MODEL ?= tiny
PAIRS ?= 256
TEXT_PAIRS ?= $(PAIRS)
GOLDENS ?= tests/goldens
CRDS ?=
LOAD ?= --slo configs/loadtest/debug-slo.yaml --alone 4 --rates 1,2,3,5 --sweep-jobs 25 --kill-rank-at 150 --saturation 2
WORKLOAD ?= configs/simulation/example.yaml
STAMP := $(VENV)/.installed

.PHONY: help setup demo serve test test-all lint fmt parity bench fairness memory storm quality chaos loadtest manifests simulate lock

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[serve,postgres,s3,traces,loadtest,dev]'
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/openai-2 openai==2.54.0 distro
	touch $@

setup: $(STAMP)  ## make .venv with everything the project needs

demo: $(STAMP)  ## start the service, run one job of every task through HTTP, write outputs/, stop
	$(BIN)/python -m cluster.demo --model $(MODEL) --out outputs

serve: $(STAMP)  ## run the service until Ctrl-C: make serve PORT=8000 STATE=state MODEL=tiny
	$(BIN)/python -m serve --model $(MODEL) --port $(PORT) --state $(STATE)

test: $(STAMP)  ## the default tests
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(STAMP)  ## the default tests and the slow ones
	$(BIN)/python -m pytest -m "not gpu"

lint: $(STAMP)  ## format, style, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(STAMP)  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

parity: $(STAMP)  ## compare with recorded tensors: make parity GOLDENS=tests/goldens
	$(BIN)/python -m pusa_dist parity $(GOLDENS)

bench: $(STAMP)  ## the engine against diffusers, and the service against a plain loop, in one run
	$(BIN)/python -m pusa_dist bench
	$(BIN)/python -m cluster.service_cost

fairness: $(STAMP)  ## fair shares of tenants, on the real service and under virtual time
	$(BIN)/python -m cluster.fairness

memory: $(STAMP)  ## 200 jobs of mixed shapes, and what every process holds after them
	$(BIN)/python -m cluster.memory

storm: $(STAMP)  ## 1,000 creates over connections that break, and the latency of creates while the gang is busy
	$(BIN)/python -m cluster.storm

quality: $(STAMP)  ## the small model, alone and adapted, measured through the service: make quality PAIRS=256
	$(BIN)/python -m cluster.quality --pairs $(PAIRS) --text-pairs $(TEXT_PAIRS) --out outputs/quality

chaos: $(STAMP)  ## kill every kind of process under 20 jobs of three tenants; nothing may be lost or left behind
	$(BIN)/python -m cluster.chaos

loadtest: $(STAMP)  ## open-loop load with a rank killed, a sweep and a report: make loadtest LOAD='--url URL --slo FILE'
	$(BIN)/python -m cluster.loadtest $(LOAD)

manifests: $(STAMP)  ## render and check every Kubernetes overlay: make manifests CRDS=folder of KubeRay's CRD schemas
	$(BIN)/python -m cluster.manifests $(if $(CRDS),--crds $(CRDS))

simulate: $(STAMP)  ## how many GPUs of which pool a workload needs, and what they cost: make simulate WORKLOAD=file
	$(BIN)/python -m cluster.simulation --check
	$(BIN)/python -m cluster.simulation --config $(WORKLOAD)

lock: $(STAMP)  ## write what is installed to .ci/constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed "s/^torch==\([0-9.]*\)+cpu/torch==\1/" > .ci/constraints.txt
