BIN := .venv/bin
ROOT ?= runs
PORT ?= 5000
# two processes, which are given whole files, by name: by their number of tests the demo, one long one, would come last
SHARED := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint audit mlflow

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: .venv/installed ## .venv with the versions of constraints.txt; needs Python 3.11 or newer

.venv/installed: pyproject.toml constraints.txt
	@for python in python3.11 python3; do \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && exec $$python -m venv .venv; \
	done; echo "no Python 3.11 or newer found: neither python3.11 nor python3" >&2; exit 1
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[jobs,dev]'
	@touch $@

demo: setup ## train, cache, diffuse, sample and evaluate on a few photos: minutes
	$(BIN)/python jobs/demo.py

test: setup ## the tests, without those that take minutes
	$(BIN)/python -m pytest $(SHARED) -m 'not slow'

test-slow: setup ## the tests that take minutes
	$(BIN)/python -m pytest $(SHARED) -m slow

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: setup ## known vulnerabilities in the versions of constraints.txt; asks PyPI, and fails where it does not answer
	$(BIN)/python -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet pip-audit
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

mlflow: setup ## MLflow on http://127.0.0.1:5000 (PORT=...) for the runs in ROOT=runs
	@test -f $(ROOT)/mlflow.db || { echo "$(ROOT)/mlflow.db does not exist; ROOT=... is the jobs' root" >&2; exit 1; }
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --workers 1 \
		--host 127.0.0.1 --port $(PORT) --backend-store-uri sqlite:///$(abspath $(ROOT))/mlflow.db
