BIN := .venv/bin
ROOT ?= runs
PORT ?= 5000
PART ?= 1/1
TENTH ?=
# two processes, which are given whole files in the order of conftest.py
SHARED := --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

.DEFAULT_GOAL := help
.PHONY: help setup demo weights test test-slow test-chaos mutants coverage lint audit docs mlflow

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: .venv/installed ## .venv with the versions of constraints.txt; needs Python 3.11 or newer

.venv/installed: pyproject.toml setup.py constraints.txt
	@for python in python3.11 python3; do \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && exec $$python -m venv .venv; \
	done; echo "no Python 3.11 or newer found: neither python3.11 nor python3" >&2; exit 1
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[jobs,dev]'
	@touch $@

demo: setup ## train, cache, diffuse, sample and evaluate on a few photos: minutes
	$(BIN)/python jobs/demo.py

weights: setup ## fetch the published weights of LPIPS and FID (620 MB), checked by their SHA-256
	$(BIN)/python jobs/fetch_weights.py

test: setup ## the fast tests
	$(BIN)/python -m pytest $(SHARED)

test-slow: setup ## jobs as a whole, compilers, a browser: many minutes
	$(BIN)/python -m pytest $(SHARED) -m slow

test-chaos: setup ## kills, full disks, nodes that go: half an hour, or a part of it (PART=2/4: the second quarter)
	$(BIN)/python -m pytest $(SHARED) -m chaos --part $(PART)

mutants: setup ## whether the fast tests notice small faults: minutes, or a tenth of it (TENTH=0 to 9)
	$(BIN)/python -m tests.mutate $(if $(TENTH),--tenth $(TENTH))

coverage: setup ## the lines and branches that the fast tests run
	$(BIN)/python -m pytest $(SHARED) --cov --cov-report term-missing:skip-covered

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: setup ## known vulnerabilities in the versions of constraints.txt; asks PyPI, and fails where it does not answer
	$(BIN)/python -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet pip-audit
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

docs: .venv/installed-docs ## the documentation as a site in site/, its links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

mlflow: setup ## serve MLflow on http://127.0.0.1:5000 (PORT=...) for the runs in ROOT=runs
	@test -f $(ROOT)/mlflow.db || { echo "$(ROOT)/mlflow.db does not exist; ROOT=... is the jobs' root" >&2; exit 1; }
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --workers 1 \
		--host 127.0.0.1 --port $(PORT) --backend-store-uri sqlite:///$(abspath $(ROOT))/mlflow.db
