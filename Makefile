# The verbs of the toolkit and of its development. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The interpreter that makes .venv; constraints.txt was pinned with Python 3.11.
PYTHON ?= $(firstword $(foreach name,python3.11 python3,$(shell $(name) -c 'print("$(name)")' 2>/dev/null)))
# More arguments for pip (PIP_ARGS) and for the verb (ARGS), e.g. ARGS="train.max_steps=20".
PIP_ARGS ?=
ARGS ?=
CONFIG ?=
RUN ?=

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO := configs/lora_nano.yaml
DEMO_RUN := runs/lora_nano
NANO := assets/llama-nano

.PHONY: help setup setup-lm-eval demo train eval merge report compare bench bench-peers faults test test-slow check sbom format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  make train CONFIG=configs/lora_nano.yaml ARGS="train.max_steps=20"'
	@echo '  make eval RUN=runs/lora_nano      (without RUN: the newest run)'

setup: $(STAMP)  ## .venv with every package at its version in constraints.txt

$(STAMP): constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no python3 found; set PYTHON=" >&2; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(PIP_ARGS) "$$(grep -m1 '^torch==' constraints.txt)"
	$(PY) -m pip install $(PIP_ARGS) -r constraints.txt
	$(PY) -m pip check
	@touch $@

setup-lm-eval: $(STAMP)  ## lm-evaluation-harness too, for `eval --lm-eval`
	$(PY) -m pip install $(PIP_ARGS) -c constraints.txt -r constraints-lm-eval.txt
	$(PY) -m pip check

demo: $(STAMP)  ## train, merge with proof, evaluate, on the embedded base: four minutes
	$(PY) -m finetune train $(DEMO) $(ARGS)
	$(PY) -m finetune merge $(DEMO_RUN)
	@echo && echo "What the base can do in plain notation, continued without any prompt format:"
	$(PY) -m finetune eval $(NANO) --probe $(NANO)/data/probe.jsonl
	@echo && echo "What needs no training: the family's most frequent answer, the nearest training row:"
	$(PY) $(NANO)/make/baselines.py --train $(NANO)/data/train.jsonl --heldout $(NANO)/data/heldout.jsonl
	@echo && echo "Held-out rows under the chat prompt: adapter, base, merged"
	$(PY) -m finetune eval $(DEMO_RUN) --against base,merged
	@echo && echo "All of it on one page:"
	$(PY) -m finetune report $(DEMO_RUN)

train: $(STAMP)  ## CONFIG=file.yaml [ARGS="key=value …"]
	@test -n "$(CONFIG)" || { echo "error: make train needs CONFIG=; there are:" configs/*.yaml >&2; exit 2; }
	$(PY) -m finetune train $(CONFIG) $(ARGS)

eval: $(STAMP)  ## [RUN=folder] held-out numbers
	$(PY) -m finetune eval $(RUN) $(ARGS)

merge: $(STAMP)  ## [RUN=folder] full weights, with the proof that they equal base and adapter
	$(PY) -m finetune merge $(RUN) $(ARGS)

report: $(STAMP)  ## [RUN=folder] one HTML page: verdict, curves, comparison, samples, data, proof
	$(PY) -m finetune report $(RUN) $(ARGS)

compare: $(STAMP)  ## every method on the embedded base, with a table and a plot: 2 hours, resumable
	$(PY) -m benchmarks.compare_methods --folder runs/compare --json runs/compare/result.json \
		--plot runs/compare/result.svg $(ARGS)

bench: $(STAMP)  ## speed and memory beside TRL and what bench-peers set up, interleaved: an hour
	$(PY) -m benchmarks.speed --folder build/speed --json build/speed.json $(ARGS)

# One environment each. LLaMA-Factory first without what it asks for: torchaudio would bring CUDA.
bench-peers: $(STAMP)  ## torchtune, LitGPT, LLaMA-Factory and axolotl in build/peers, for make bench
	for peer in torchtune litgpt llamafactory axolotl; do \
		pip="build/peers/$$peer/bin/pip install $(PIP_ARGS)" && \
		$(PYTHON) -m venv build/peers/$$peer && \
		$$pip "$$(grep -m1 '^torch==' constraints.txt)" && \
		{ test $$peer != llamafactory || $$pip --no-deps llamafactory==0.9.5; } && \
		$$pip "$$(grep -m1 '^torch==' constraints.txt)" -r benchmarks/speed/peers/$$peer.txt || exit 1; \
	done

faults: $(STAMP)  ## kills, full disks, power cuts and damage at every point of a run: an hour, in parts with --only
	$(PY) -m benchmarks.faults --folder build/faults --json build/faults.json $(ARGS)

# One worker a core, each with a thread: models this small gain nothing by a second one.
IN_PARALLEL := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n logical --maxprocesses 4 --dist worksteal

test: $(STAMP)  ## the tests, without the slow ones; ARGS="-n 0 tests/test_x.py" for one by one
	$(IN_PARALLEL) -m "not slow" $(ARGS)

test-slow: $(STAMP)  ## the slow tests alone
	$(IN_PARALLEL) -m slow $(ARGS)

check: $(STAMP)  ## format, lint, types, the rules of the house, every config: under a minute
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/house

sbom: $(STAMP)  ## build/sbom.json: every installed package, its version, licence and source
	mkdir -p build
	$(PY) -m pip inspect --local > build/sbom.json

format: $(STAMP)  ## formats and sorts imports in place
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix-only -q .

clean:  ## removes build/ and caches; .venv and runs/ stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
