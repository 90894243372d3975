# One environment for everything: .venv, made from PYTHON with the versions of constraints.txt.
#
#   make test                      all checks and tests that need no GPU
#   make demo PYTHON=python3.12    with another Python

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=

# CUDA kernels are built where nvcc is; for one kind of GPU here, for all kinds in a wheel. A list is separated by "\;".
CUDA_ARCHITECTURES ?= 90a
export SKBUILD_CMAKE_DEFINE ?= QBB_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
RUN_PIP := $(PY) -m pip --disable-pip-version-check install -c constraints.txt

# The library is built when the package is installed, so its sources are prerequisites of the installation. Folders are
# listed too: their time changes when a file is taken away.
NATIVE := $(shell find custom_ops -type f ! -name '*.py' ! -name '*.pyc' ! -name '*.md' 2>/dev/null) \
          $(shell find custom_ops -mindepth 1 -type d ! -name __pycache__ 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format test-gpu test-slow soak coverage wheel-test install clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(INSTALLED) ## export a real model, run it with and without our kernels, print the difference
	$(PY) examples/minilm_demo.py

# One thread a worker: PyTorch's own threads would wait for each other on cores that the other workers use.
test: lint ## linters, types, layers, then all tests that need no GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(INSTALLED) ## linters, types and layers only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo

format: $(INSTALLED) ## put the Python files into the one format
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .

test-gpu: $(INSTALLED) ## tests that need an NVIDIA GPU
	$(PY) -m pytest -m gpu $(PYTEST_ARGS)

test-slow: $(INSTALLED) ## tests that take minutes each
	$(PY) -m pytest -m slow -n $(WORKERS) $(PYTEST_ARGS)

soak: $(INSTALLED) ## every damaged file, every check removed in turn, …: hours, with tables at the end
	$(PY) -m pytest -m soak -n 0 $(PYTEST_ARGS)

# The validators, and the tests that aim at them: what no test reaches here, no test guards.
VALIDATORS := */format.py,*/record.py,*/artifact.py,*/gate.py,*/verify.py
VALIDATOR_TESTS := tests/unit/test_format.py tests/unit/test_record.py tests/unit/test_record_edges.py \
                   tests/unit/test_artifact.py tests/corrupt/test_kinds.py tests/golden

coverage: $(INSTALLED) ## every branch of the validators is run by their tests, or this fails
	$(PY) -m coverage run -m pytest -q -n 0 $(VALIDATOR_TESTS)
	$(PY) -m coverage report --show-missing --fail-under=100 --include='$(VALIDATORS)'

wheel-test: $(INSTALLED) ## sdist, wheel from the sdist, tests against the installed wheel without PyTorch
	.ci/wheel-test

install: $(INSTALLED) ## the environment and the library, nothing else

clean: ## remove .venv and all build output
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# The stamp and not bin/python is the target: where venv fails half-way it leaves a python behind.
$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: $(PYTHON) not found; say which Python to use: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("error: Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is %d.%d; say which one to use: make PYTHON=/path/to/python3.12" % v)'
	"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

# The build tools come first and the build is not isolated: then constraints.txt holds for them too, and CMake keeps its
# files in build/editable, so that a change in C++ costs seconds.
$(INSTALLED): $(VENV)/.created pyproject.toml constraints.txt $(NATIVE)
	$(RUN_PIP) -q scikit-build-core cmake ninja
	$(RUN_PIP) --no-build-isolation --config-settings=build-dir=build/editable -e '.[dev]'
	@touch $@
