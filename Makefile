# Every target does the set-up it needs and is safe to repeat. `make quickstart` works in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-newest lock lint format hooks docs build clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s%s\n", $$1, $$2}'

install: $(STAMP) ## a virtual environment in .venv with the kit and the tools to develop it
	@echo "Installed. Next: make quickstart, or . $(BIN)/activate and lcm-kit --help"

# Installed again whenever one of these is newer than the last complete installation; with the tested versions.
$(STAMP): pyproject.toml requirements/tested.txt requirements/torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; try: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/versions.py install $(VENV)
	touch $(STAMP)

quickstart: $(STAMP) ## the end-to-end run on the embedded base: check, encode, style, distil, export, evaluate, report
	$(BIN)/lcm-kit quickstart $(ARGS)

# A process a core with one thread each: 5 minutes for 10 on two cores, where one process with two threads idles.
test: $(STAMP) ## the tests but for the slow ones, offline
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" \
		--numprocesses logical --maxprocesses 8 --dist worksteal $(ARGS)

test-slow: $(STAMP) ## the slow tests: a whole quickstart, held to its promise
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow $(ARGS)

lock: $(STAMP) ## resolve the ranges of pyproject.toml anew: requirements/, the versions that are tested
	$(BIN)/python tools/versions.py lock

test-newest: $(STAMP) ## the tests with the newest and with the oldest versions of the ranges; says what breaks
	$(BIN)/python tools/versions.py try newest oldest $(if $(ARGS),-- $(ARGS))

lint: $(STAMP) ## ruff and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff fix what it can
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

hooks: $(STAMP) ## lint before every commit
	$(BIN)/pre-commit install

# NO_MKDOCS_2_WARNING: Material's notice of its own end of life (see pyproject.toml), no warning about our pages
docs: $(STAMP) ## the docs site into build/site, offline; a broken link is an error
	HF_HUB_OFFLINE=1 $(BIN)/python tools/reference_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html; with search: $(BIN)/python -m http.server --directory build/site"

build: $(STAMP) ## wheel and sdist into dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove what was built, but no runs and no caches of images
	rm -rf dist build .pytest_cache .ruff_cache .mypy_cache
