# make demo, make test: all that a fresh machine needs. Each makes the virtual environment first if it is missing.
#
#   PYTHON=python3.12 make test    another interpreter, in an environment of its own (.venv-3.12)
#   VENV=some/dir make test        an environment somewhere else
#   LOCK=requirements/py312-jax011.txt VENV=.venv-3.12-jax011 PYTHON=python3.12 make test    other versions than that Python's
#   make test-matrix               the suite on every Python and jax that is supported, as far as the Pythons are found
#   make test ARGS="-k store -x"   arguments for pytest, or for the benchmark (make bench ARGS="--rounds 5")

SHELL := /bin/bash
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
NEW_ENOUGH := $(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null)
ifneq ($(NEW_ENOUGH),True)
$(error ntkjax needs Python 3.11 or newer; "$(PYTHON)" is $(or $(VERSION),not to be found). Name another one: PYTHON=python3.12 make test)
endif

# An interpreter that was asked for gets an environment of its own, so that several versions stand side by side.
ifeq ($(origin PYTHON),file)
VENV ?= .venv
else
VENV ?= .venv-$(VERSION)
endif
TORCH_VENV ?= $(VENV)-torch
DOCS_VENV ?= $(VENV)-docs

# One lock for each Python that is tested, and one for each older jax (py312-jax011.txt); a newer Python takes the newest.
LOCK ?= $(firstword $(wildcard requirements/py$(subst .,,$(VERSION)).txt) requirements/py313.txt)
# The stamp's name holds the version: an environment of another Python is made anew.
STAMP := $(VENV)/.installed-$(VERSION)
TORCH_STAMP := $(TORCH_VENV)/.installed-$(VERSION)
DOCS_STAMP := $(DOCS_VENV)/.installed-$(VERSION)
# Cores that this process may use, which on a shared machine are fewer than there are.
WORKERS := $(shell $(PYTHON) -c 'import os; own = getattr(os, "sched_getaffinity", None); print(min(4, len(own(0)) if own else os.cpu_count() or 1))')
# Errors alone (--quiet twice): pip warns of every place that its settings name and that is not there.
PIP := -m pip --disable-pip-version-check install --quiet --quiet
# $(call fresh_venv,DIR): keep the environment of this Python, replace one of another
fresh_venv = test "$$($(1)/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = $(VERSION) \
	|| $(PYTHON) -m venv --clear $(1)

.PHONY: setup demo real-model test test-slow test-torch test-matrix lint bench bench-gpu peers notebooks docs lock clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): $(LOCK) requirements/nt.txt pyproject.toml
	@echo "Installing $(LOCK) into $(VENV)"
	@$(call fresh_venv,$(VENV))
	@$(VENV)/bin/python $(PIP) -r $(LOCK)
	@# Without its dependencies: they include TensorFlow, which nothing here needs.
	@$(VENV)/bin/python $(PIP) --no-deps -r requirements/nt.txt
	@$(VENV)/bin/python $(PIP) --no-deps --editable .
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/ntkjax demo

# SmolLM2-135M-Instruct into build/models (or $NTKJAX_MODELS), for --model real; what is there is not fetched again.
# MODEL=gemma3: Gemma 3 270M, for --model gemma3, once its terms are accepted (docs/guide/real-model.md).
real-model: $(STAMP)
	$(VENV)/bin/python -m ntkjax.assets.make_real_model $(MODEL) $(if $(filter yes,$(ACCEPT_TERMS)),--accept-terms)

# A file's tests stay in one worker (--dist loadfile), so that what they share is made once. A test that hangs is stopped
# after 15 minutes with its traceback; those of `make test-slow` may take longer.
test: $(STAMP)
	$(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile -o faulthandler_timeout=900 \
		-o faulthandler_exit_on_timeout=true $(ARGS)

test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile -m slow $(ARGS)

# Each supported Python with its lock, and Python 3.12 with the older jax, in environments of their own under build/matrix.
# A Python that is not found is skipped, with a word; one failure stops no other, and fails the whole.
MATRIX := 3.11:py311 3.12:py312-jax011 3.12:py312 3.13:py313

test-matrix:
	@failed=; for entry in $(MATRIX); do \
		version=$${entry%%:*}; name=$${entry##*:}; \
		python=$$(bash .ci/find_python $$version) || { echo "test-matrix: $$name skipped: no Python $$version found"; continue; }; \
		echo "test-matrix: $$name"; \
		$(MAKE) --no-print-directory test PYTHON="$$python" LOCK=requirements/$$name.txt VENV=build/matrix/$$name \
			|| failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "test-matrix: failed:$$failed"; exit 1; }

# The comparisons with torch, transformers and peft run only where those are installed: here.
test-torch: $(TORCH_STAMP)
	$(TORCH_VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

$(TORCH_STAMP): $(LOCK) requirements/nt.txt requirements/torch.txt requirements/lm-eval.txt requirements/trackers.txt requirements/sentence.txt requirements/remote.txt pyproject.toml
	@echo "Installing $(LOCK), torch.txt, lm-eval.txt, trackers.txt, sentence.txt and remote.txt of requirements/ into $(TORCH_VENV)"
	@$(call fresh_venv,$(TORCH_VENV))
	@$(TORCH_VENV)/bin/python $(PIP) -r $(LOCK) -r requirements/torch.txt -r requirements/trackers.txt \
		-r requirements/sentence.txt
	@# All that lm-eval and s3fs need is listed there. lm-eval wants an older python-dateutil than the lock has; the others
	@# take either.
	@$(TORCH_VENV)/bin/python $(PIP) --no-deps -r requirements/lm-eval.txt -r requirements/remote.txt
	@$(TORCH_VENV)/bin/python $(PIP) --no-deps -r requirements/nt.txt
	@$(TORCH_VENV)/bin/python $(PIP) --no-deps --editable .
	@touch $@

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

bench: $(STAMP)
	$(VENV)/bin/python experiments/bench.py $(ARGS)

# What experiments/08_throughput.py compares us with, each in an environment of its own under build/peers: never needed by
# the package or its tests. bergson goes without its dependencies, all of which are in its file but torchvision and
# torchaudio: it never imports them, and of another build than torch they break its import. One failure stops no other.
PEERS := torch trak dattri bergson

peers: $(PEERS:%=build/peers/%/.installed-$(VERSION))

build/peers/%/.installed-$(VERSION): experiments/peers/%.txt
	@echo "Installing $< into build/peers/$*"
	@mkdir -p build/peers
	@$(call fresh_venv,build/peers/$*)
	-@{ grep -v '^bergson==' $< | build/peers/$*/bin/python $(PIP) -r /dev/stdin \
		&& grep '^bergson==' $< | build/peers/$*/bin/python $(PIP) --no-deps -r /dev/stdin; \
		} > build/peers/$*.log 2>&1 && touch $@ || { echo "build/peers/$*: not installed:"; tail -n 5 build/peers/$*.log; false; }

# On a machine with a GPU or TPU and its own jax nothing need be installed: make bench-gpu BENCH_PYTHON=python3
BENCH_PYTHON ?= $(VENV)/bin/python
bench-gpu: $(if $(filter $(VENV)/bin/python,$(BENCH_PYTHON)),$(STAMP))
	$(BENCH_PYTHON) experiments/bench_gpu.py $(ARGS)

# Run the scripts under notebooks/ and keep what they print and draw beside them.
notebooks: $(STAMP)
	cd notebooks && $(abspath $(VENV))/bin/jupytext --quiet --to ipynb *.py && $(abspath $(VENV))/bin/jupyter-execute --inplace *.ipynb

# The site, into build/docs. Sources are parsed, not imported, so ntkjax need not be installed.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --clean

$(DOCS_STAMP): requirements/docs.txt
	@echo "Installing requirements/docs.txt into $(DOCS_VENV)"
	@$(call fresh_venv,$(DOCS_VENV))
	@$(DOCS_VENV)/bin/python $(PIP) -r requirements/docs.txt
	@touch $@

# Resolve pyproject.toml afresh for this Python and write what came out, names and versions only. An older jax in a lock of
# its own: PYTHON=python3.12 JAX=0.11.2 make lock writes requirements/py312-jax011.txt.
JAX ?=
LOCKED := requirements/py$(subst .,,$(VERSION))$(if $(JAX),-jax$(subst .,,$(basename $(JAX)))).txt
lock:
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/python $(PIP) '.[dev,nt]' $(if $(JAX),'jax==$(JAX)' 'jaxlib==$(JAX)')
	@build/lock/bin/python -m pip --disable-pip-version-check freeze --exclude ntkjax > build/lock.txt
	@mv build/lock.txt $(LOCKED) && rm -rf build/lock
	@echo "Wrote $(LOCKED)"

clean:
	rm -rf $(VENV) $(TORCH_VENV) $(DOCS_VENV) build dist *.egg-info .pytest_cache .ruff_cache
