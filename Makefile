# make run    a demo: the embedded tiny model, split over RANKS processes on this machine
# make test   everything: ruff, mypy, pytest
# make lint   ruff and mypy only
# make clean  remove what these made, .venv too
#
# PYTHON=... picks the interpreter, BACKEND=cuda the NVIDIA backend on Linux (on macOS it is always Metal).

VENV    := .venv
BIN     := $(VENV)/bin
BACKEND ?= cpu
RANKS   ?= 2
PROMPT  ?= My cat is called Miro. What is 7 + 5, and what is my cat called?
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

.PHONY: run test lint dev clean

run: $(VENV)/.installed-$(BACKEND)
	$(BIN)/m3dist generate --model tiny -n $(RANKS) --temperature 0 --prompt "$(PROMPT)"

# Tests that compute share the cores; those with limits in seconds run one at a time.
test: lint
	$(BIN)/python -m pytest -n 2 tests/paper tests/unit tests/reference
	$(BIN)/python -m pytest tests/ranks tests/hosts

lint: dev
	$(BIN)/ruff check .
	$(BIN)/mypy

dev: $(VENV)/.installed-dev-$(BACKEND)

# The stamps make a second call free; an edit of pyproject.toml installs again.
$(VENV)/.installed-$(BACKEND): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$(BACKEND)]"
	@touch $@

$(VENV)/.installed-dev-$(BACKEND): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev,$(BACKEND)]"
	@touch $@ $(VENV)/.installed-$(BACKEND)

# pip before 22 cannot install a pyproject.toml package in editable mode.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "m3dist needs Python 3.10 or newer and found none on PATH." \
		"Install one (macOS: brew install python) or name it: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet "pip>=22"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
