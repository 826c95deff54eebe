# make demo   set up, export SmolLM2-135M-Instruct to ONNX, compile it under 1 GB, ask it a question
# make test   set up, run the linters and the tests
# make test-all  also the slow tests: the real model, kills at random moments, other Pythons
# make check  ruff and mypy
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUDGET ?= 1GB
WORKLOAD ?= 8x256,1x2048

.PHONY: demo test test-all check setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

build/smollm2-135m.onnx: | $(VENV)/.ready
	$(BIN)/python -m kvc_models export smollm2-135m $@

demo: build/smollm2-135m.onnx
	$(BIN)/kvc compile build/smollm2-135m.onnx --budget $(BUDGET) --workload $(WORKLOAD) --output build/smollm2-135m.kvc --force
	$(BIN)/kvc run build/smollm2-135m.kvc --prompt "What is the capital of France?"

test: setup check
	$(BIN)/python -m pytest -q -m "not slow and not gpu" --numprocesses 2 --dist loadfile

test-all: setup check
	$(BIN)/python -m pytest -q -m "not gpu"

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist
