# Every target starts from nothing: `make demo` and `make test` on a fresh clone install what they need.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
ARCH   ?= rwkv7
READY  := $(VENV)/.ready

.PHONY: demo test test-slow scorecard check bench clean

demo: $(READY)            ## train a small RWKV on the source code of this Python, then let it write
	$(VENV)/bin/wkv demo --arch $(ARCH)

test: check               ## format, lint, types and the quick tests: what a change must pass
	$(RUN) -m pytest -q -n auto --dist worksteal

test-slow: $(READY)       ## the tests that take minutes
	$(RUN) -m pytest -q -n auto --dist worksteal -m slow

scorecard: $(READY)       ## what was tried to break it, how often, and what was lost
	$(RUN) -m pytest -q -n auto --dist worksteal -m scorecard --scorecard

check: $(READY)
	$(RUN) -m ruff format --check --quiet .
	$(RUN) -m ruff check --quiet .
	$(RUN) -m mypy

bench: $(READY)           ## side by side with the official package; wants an idle machine
	$(RUN) benchmarks/against_rwkv.py
	$(RUN) benchmarks/scaling.py

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "wkv needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
