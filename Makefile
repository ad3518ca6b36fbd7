# `make demo` and `make test` are all a newcomer needs; both make .venv when it is missing.
# Another Python: make demo PYTHON=python3.12 (delete .venv first when one is there).

PYTHON ?= python3

# Byte code is written whatever the caller's settings: without it every start of `xded` compiles its imports again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help venv demo test test-fast clean

help:
	@echo "make demo       embedded corpus, teachers, students: from nothing to a report, in work/demo"
	@echo "make test       the whole test suite"
	@echo "make test-fast  the test suite without its slow end-to-end parts"
	@echo "make venv       only install, in .venv"
	@echo "make clean      delete .venv and the caches (nothing under work/ or runs/)"

venv: .venv/installed

demo: .venv/installed
	.venv/bin/xded demo --out work/demo

test: .venv/installed
	.venv/bin/python -m pytest

test-fast: .venv/installed
	.venv/bin/python -m pytest -m 'not slow'

# torch goes first, alone: with its version fixed, pip takes a CPU build where one is offered.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "xded needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is" \
	    "$$({ $(PYTHON) --version || echo not there; } 2>/dev/null)." \
	    "Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	.venv/bin/python -m compileall -q src
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist
