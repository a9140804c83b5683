PYTHON ?= python3
BIN = .venv/bin

.PHONY: search test docs clean

search: .venv/installed
	$(BIN)/archdsl search --budget 162M

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2

docs: .venv/installed-docs
	$(BIN)/python -m mkdocs build --strict

# constraints.txt pins every package, torch above all
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[plots]"
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
