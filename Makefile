# Every target works alone in a fresh clone: Python 3.11 or newer and pip are enough.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test check bench peers format clean

demo: $(VENV)/.core  ## train on the standard library's documentation and print a sample
	$(RUN)/recurra demo

test: $(VENV)/.dev  ## run the tests
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -n 2 --dist worksteal

check: $(VENV)/.dev  ## format, lint and types
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

bench: $(VENV)/.dev  ## time recurra beside its peers, after checking that the numbers agree; BENCH=--quick for a short run
	$(RUN)/python benchmarks/speed.py $(BENCH)

peers: $(VENV)/.dev benchmarks/peers.txt  ## more peers for make bench, JAX and ONNX Runtime, in an environment of their own
	$(PYTHON) -m venv $(VENV)/peers
	$(VENV)/peers/bin/pip install --quiet --requirement benchmarks/peers.txt

format: $(VENV)/.dev
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "recurra needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; call make with PYTHON=python3.12, say")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.core
