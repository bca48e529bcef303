# make quickstart   train, distil and compare on an invented world, in minutes, on a CPU
# make test         format, lint, types, import rules and tests
# make test-slow    the tests that take minutes
# make test-kernels Triton kernels by Triton's interpreter, on a CPU (Linux; installs Triton, 900 MB)
# make docs         the documentation, into outputs/site
# make setup        only .venv and the installation (the others call it)

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test test-slow test-kernels docs clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("deltakd needs Python 3.11 or newer; give one: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/python -m deltakd.study experiments/quickstart

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-kernels: setup .venv/.kernels
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels/test_gpu.py tests/kernels/test_compiles.py tests/generation/test_token_kernel.py

.venv/.kernels: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[kernels]'
	touch $@

docs: setup .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv outputs
