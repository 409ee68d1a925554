# SPDX-License-Identifier: Apache-2.0
# Front door: `make test` and `make demo` need Python >= 3.10, a C++17 compiler and nothing else.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# CUDA is compiled where there is an nvcc: for the GPU of this machine, or for one architecture if
# there is none that the kernels could run on.
CUDA_ARCH ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
  awk '$$1 >= 8 { print $$1; exit }'),90a)
ALL_CUDA_ARCHS := 80;90a;100+PTX
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
BENCH_FLAGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
LIBRARY := python/voxconv/_C.abi3.so
NATIVE := $(shell find csrc -type f 2>/dev/null) setup.py
CPP := $(filter %.h %.inc %.cpp %.cuh %.cu,$(NATIVE) $(wildcard tests/cuda_on_cpu/*))

.DEFAULT_GOAL := help
.PHONY: help env build cuda test demo bench lint format wheel clean

help:
	@echo "make test    set up, build, run the tests            PYTEST_FLAGS='-k depthwise'"
	@echo "make demo    the main job on a real volume           DEMO_FLAGS='--volume scan.nii.gz'"
	@echo "make bench   time every case against torch           BENCH_FLAGS='--op depthwise'"
	@echo "make build   compile csrc/ into $(LIBRARY)"
	@echo "make cuda    the same, with CUDA for $(ALL_CUDA_ARCHS) (needs nvcc)"
	@echo "make env     $(VENV) with torch and the build tools   TORCH='$(TORCH)'"
	@echo "make lint    ruff, mypy and clang-format, no changes; 'make format' applies them"
	@echo "make wheel   dist/*.whl for every torch >= 2.10"
	@echo "make clean   remove what was built (not $(VENV))"
	@echo "PYTHON=$(PYTHON) is the interpreter $(VENV) is made from."

# An environment that is already there is kept, unless its interpreter no longer runs.
$(STAMPS)/env:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than 3.10: set PYTHON=" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  $(PYTHON) -m virtualenv --clear $(VENV) || \
	  { echo "cannot make $(VENV): install python3-venv or virtualenv" >&2; exit 1; }
	$(PIP) install -q "setuptools>=77" wheel ninja numpy
	$(PIP) install $(TORCH)
	@mkdir -p $(STAMPS)
	@$(PY) -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" \
	  > $(STAMPS)/constraints.txt
	@touch $@

# voxconv itself, editable, with the extra named by the stamp. Without the library, which pip would
# compile from scratch each time; and constrained, so that nothing ever replaces torch.
$(STAMPS)/%: $(STAMPS)/env pyproject.toml setup.py
	VOXCONV_BUILD=0 $(PIP) install -q --no-build-isolation -c $(STAMPS)/constraints.txt \
	  -e '.$(if $(filter-out base,$*),[$*])'
	@touch $@

$(LIBRARY): $(NATIVE) | $(STAMPS)/env
	VOXCONV_CUDA_ARCH="$(CUDA_ARCH)" $(PY) setup.py -q build_ext --inplace
	@touch $@

cuda: $(STAMPS)/env
	VOXCONV_CUDA=1 VOXCONV_CUDA_ARCH="$(ALL_CUDA_ARCHS)" $(PY) setup.py -q build_ext --inplace

env: $(STAMPS)/env
build: $(LIBRARY) $(STAMPS)/base

test: $(LIBRARY) $(STAMPS)/test
	$(PY) -m pytest $(PYTEST_FLAGS)

demo: $(LIBRARY) $(STAMPS)/demo
	$(PY) -m voxconv demo $(DEMO_FLAGS)

bench: $(LIBRARY) $(STAMPS)/bench
	$(PY) bench/run.py $(BENCH_FLAGS)

lint: $(STAMPS)/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(STAMPS)/lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

wheel: $(STAMPS)/env
	rm -rf build/lib* build/bdist*
	$(PIP) wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(LIBRARY)
	find python triton_kernels tests bench -name __pycache__ -prune -exec rm -rf {} +
