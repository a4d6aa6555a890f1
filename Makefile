# Two commands on a fresh machine with Python 3.11 or newer: `make app` and `make test`.
# Everything lives in .venv; a target that finds it current does not touch it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
EXTRAS := figures,gpu,prove,ray,test,dev
PYTEST := $(BIN)/python -m pytest

.PHONY: help setup app test check lint format lock gallery clean

help: ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

setup: $(STAMP) ## virtual environment in .venv with the locked versions; nothing when it is current

# torch comes from the lock like everything else: an unpinned one would be the newest build with gigabytes of CUDA.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, and '$(PYTHON)' is $$($(PYTHON) -V 2>/dev/null || echo missing): install it, or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV): several minutes the first time, seconds after that."
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c requirements.lock -e ".[$(EXTRAS)]"
	@touch $@

app: setup ## the workbench in the browser, on the gallery
	$(BIN)/workbench app

test: setup ## every test; the browser's run where a Chromium is on PATH
	$(PYTEST) -n 2 --dist loadfile

check: setup ## the fast tests, about a minute
	$(PYTEST) -n 2 --dist loadfile -m "not slow and not browser"

lint: setup ## format, style, types and the walls between the packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: setup ## formats, and mends what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The local part of a version (`+cpu`) names a build of one machine, so it is left out: any build of that version will do.
lock: ## newest versions that pyproject.toml admits into requirements.lock; torch stays unless TORCH=x.y.z says otherwise
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	torch="$${TORCH:-$$(sed -n 's/^torch==//p' requirements.lock)}"; \
	.lock-venv/bin/python -m pip install --disable-pip-version-check --quiet "torch==$$torch" -e ".[$(EXTRAS)]"
	{ sed -n '/^#/p' requirements.lock; .lock-venv/bin/python -m pip freeze --exclude-editable | sed -E 's/^([^=]+==[^+]+)\+.*/\1/' | grep -v -E '^(nvidia|cuda)-'; } > requirements.lock.new
	@! grep -nE '://|@|/' requirements.lock.new || { echo "requirements.lock.new holds a path or an address; requirements.lock is unchanged" >&2; exit 1; }
	mv requirements.lock.new requirements.lock && rm -rf .lock-venv

gallery: setup ## trains the gallery's runs anew, minutes each; delete workbench/gallery/NAME first
	$(BIN)/workbench train modular --run gallery-modular
	$(BIN)/python -m apps.gallery gallery-modular modular
	$(BIN)/workbench train composition --run gallery-composition
	$(BIN)/python -m apps.gallery gallery-composition composition 6
	$(BIN)/workbench train composition-shared --run gallery-composition-shared
	$(BIN)/python -m apps.gallery gallery-composition-shared composition-shared 8
	$(BIN)/workbench train comparison --run gallery-comparison
	$(BIN)/python -m apps.gallery gallery-comparison comparison 12
	$(BIN)/workbench train search --seed 1 --run gallery-search
	$(BIN)/python -m apps.gallery gallery-search search 12
	$(BIN)/workbench train program-hist --run gallery-hist
	$(BIN)/python -m apps.gallery gallery-hist hist 6
	for task in reverse sort; do \
		$(BIN)/workbench train program-$$task --run gallery-$$task; \
		$(BIN)/python -m apps.gallery gallery-$$task $$task 6; \
	done
	$(BIN)/workbench train skills --run gallery-skills
	$(BIN)/python -m apps.gallery gallery-skills skills-base 4
	for skill in tone topic ends repeat; do \
		$(BIN)/workbench finetune gallery:skills-base $$skill --run gallery-skills-$$skill; \
		$(BIN)/python -m apps.gallery gallery-skills-$$skill skills-$$skill 4; \
	done

clean: ## removes .venv and the caches; keeps runs/
	rm -rf $(VENV) .lock-venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
