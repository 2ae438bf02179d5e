# Two commands do everything on a machine with Python 3.11 and nothing else: make quickstart, make test.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: quickstart test test-slow lint check first-commands clean

quickstart: .venv/installed-cpu  ## build, train, insert a concept without training, look: quickstart/report.html
	$(BIN)/python -m tools.quickstart $(ARGS)

test: .venv/installed-test  ## the default suite
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

test-slow: .venv/installed-test  ## kill -9, soak and other long tests
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: .venv/installed-test  ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test  ## all of that, and the default suite

first-commands: .venv/installed-test  ## the first commands a user types, word for word, on real photos
	$(BIN)/python -m tools.first_commands

clean:
	rm -rf .venv quickstart build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed-cpu: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[cpu]'
	touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[all,test]'
	touch $@ .venv/installed-cpu
