# Every target starts from nothing: `make demo` and `make test` on a fresh clone install what they need.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
ARCH   ?= rwkv7
READY  := $(VENV)/.ready
PEERS  := .venv-peers

.PHONY: demo test test-slow sanitize scorecard check bench bench-peers pretrained clean

demo: $(READY)            ## train a small RWKV on the source code of this Python, then let it write
	$(VENV)/bin/wkv demo --arch $(ARCH)

test: check               ## format, lint, types and the quick tests: what a change must pass
	$(RUN) -m pytest -q -n auto --dist worksteal

test-slow: $(READY)       ## the tests that take minutes
	$(RUN) -m pytest -q -n auto --dist worksteal -m slow

sanitize: $(READY)        ## the compiled engine's tests, watched for stray memory, undefined behaviour and races
	native/sanitize.sh $(RUN) build

scorecard: $(READY)       ## what was tried to break it, how often, and what was lost
	$(RUN) -m pytest -q -n auto --dist worksteal -m scorecard --scorecard

check: $(READY)
	$(RUN) -m ruff format --check --quiet .
	$(RUN) -m ruff check --quiet .
	$(RUN) -m mypy

bench: $(READY)           ## side by side with the official package; wants an idle machine
	$(RUN) benchmarks/against_rwkv.py
	$(RUN) benchmarks/scaling.py

# llama.cpp is compiled for this processor, which takes many minutes, and stays out of $(VENV).
bench-peers: $(READY) $(PEERS)/.ready ## CPU speed in every format, beside rwkv and llama.cpp; wants an idle machine
	$(RUN) benchmarks/cpu.py

$(PEERS)/.ready: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-binary llama-cpp-python -r $<
	@touch $@

# Interrupted anywhere, the same command goes on.
WORK := runs/python
pretrained: $(WORK)/run/model.safetensors $(WORK)/transformer.safetensors ## the model that comes with wkv, again from its seed: three hours of two cores
	$(RUN) benchmarks/model_card.py $(WORK)

$(WORK)/tokenizer.json: | $(READY)
	$(VENV)/bin/wkv data tokenizer stdlib --vocab-size 2048 --out $@

$(WORK)/data/data.json: $(WORK)/tokenizer.json
	$(VENV)/bin/wkv data pack stdlib --tokenizer $< --out $(WORK)/data

$(WORK)/run/model.safetensors: $(WORK)/data/data.json
	$(VENV)/bin/wkv train $(WORK)/data --config pretrained/run.toml --out $(WORK)/run --prompt "def "
	@test -f $@

$(WORK)/transformer.safetensors: $(WORK)/data/data.json
	$(RUN) benchmarks/transformer.py $(WORK)

clean:
	rm -rf $(VENV) $(PEERS) build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): requirements-dev.txt pyproject.toml $(wildcard native/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "wkv needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
