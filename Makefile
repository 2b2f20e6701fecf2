# Two commands: `make run` and `make test`. Everything they need they set up themselves, in .venv.
VENV ?= .venv
ARGS ?=
python := $(VENV)/bin/python
export VENV PYTHON

.PHONY: help run test check format setup setup-dev clean

help:
	@echo "make run     the studio at http://127.0.0.1:7860       (make run ARGS=\"--port 7870\")"
	@echo "make test    lint, types and every test, on a fresh clone too"
	@echo "make check   lint and types alone"
	@echo "make format  put the code into its shape"
	@echo "make clean   delete the environment and the caches, never your workspace"

run: setup
	@$(python) app.py $(ARGS)

test: check
	@$(python) tests/browser/chromium.py
	@echo "attune: tests"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(python) -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

check: setup-dev
	@echo "attune: lint and types"
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy

format: setup-dev
	@$(python) -m ruff check --fix .
	@$(python) -m ruff format .

setup:
	@found=$$(.ci/find-python) && "$$found" .ci/setup.py "$(VENV)"

setup-dev:
	@found=$$(.ci/find-python) && "$$found" .ci/setup.py "$(VENV)" --dev

clean:
	rm -rf "$(VENV)" .pytest_cache .mypy_cache .ruff_cache
