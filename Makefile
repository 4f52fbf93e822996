# The two commands of the README, and what CI runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint unit report docs clean

demo: .venv/ready
	$(BIN)/python pipelines/quickstart.py

test: .venv/ready lint unit docs

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# The models of the tests are tiny: processes beside each other help, threads only wait for each other.
unit: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2

# Write the figures of docs/results into README and docs.
report: .venv/ready
	$(BIN)/python -m benchmarks.report

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv out site
