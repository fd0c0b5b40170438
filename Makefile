# On a fresh clone `make demo` and `make test` need nothing but Python >= 3.11 and, the first time, a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint wheel docs clean

demo: $(INSTALLED)
	$(BIN)/mmbridge demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel --no-isolation

docs: $(VENV)/.docs
	$(BIN)/zensical build --clean --strict

clean:
	rm -rf build dist demo site *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Only a change of what is installed calls pip again, so that everything works offline afterwards.
$(INSTALLED): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@
