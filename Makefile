# make demo      set up, then transcribe the example clips with several models
# make test      set up, then check style, types, layers and behaviour
# make quick     set up, then run the tests that take a moment: nine in ten of them
# make cluster   set up, then test on Ray, whose processes take a while to start
# make others    set up others, then test with PyAV 18, with 19 and with faster-whisper2
# make docs      set up, then build the documentation in build/docs
# make coverage  set up, then run all tests and see which lines they reach
# make bench     set up, then measure
# make apps      set up .venv-apps, then try other people's programs on cached models;
#                with TORCH=1 (5 GB) also those that need torch
# make clients   set up .venv-clients, then try other people's clients on a server
# make soak      set up, then try at random what may happen, for much longer
# make gpu       set up, then test and measure on a card; writes benchmarks/results
#
# Each sets up .venv by itself; all that it needs is Python 3.10 or later, and
# PYTHON=python3.12 chooses which. Nothing outside of this checkout is touched, but for
# pip's cache and one thing more: as root on Debian, `make test` installs the package
# chromium if it is missing. `make clean` removes what they made.

PYTHON ?= python3
BIN := .venv/bin
# Models that are put together or converted stay here, not in the user's cache.
RUN := XDG_CACHE_HOME="$(CURDIR)/examples/.cache" $(BIN)/python
# One test at a time for each processor, and one more, since tests also wait.
JOBS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
SHARED := --numprocesses $(JOBS) --maxprocesses 8 --dist worksteal
PYTEST := $(BIN)/pytest $(SHARED)

# For environments of a few tests: what is never imported need not be compiled.
INSTALL := pip install --quiet --no-compile
OTHERS := hypothesis pytest pytest-timeout pytest-xdist
# PyAV 19 needs Python 3.12; NEWER=/path/to/python chooses one.
NEWER ?= $(shell for each in $(PYTHON) python3.14 python3.13 python3.12 \
    "$$HOME"/.pyenv/versions/3.1[2-9]*/bin/python; do \
    "$$each" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && \
    echo "$$each" && break; done)

.SECONDARY: # what was set up for a pattern is kept
.PHONY: demo test lint types layers unit cluster quick docs others others-fork coverage \
    bench bench-apps bench-cluster apps clients soak gpu clean

demo: .venv/demo
	$(RUN) examples/multilingual.py
	$(RUN) examples/ab_test.py

test: lint types layers unit cluster

lint: .venv/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# The examples import each other as programs do, not as a package: hence two runs of
# mypy. This mode of pyright looks only in the environment of the first python in PATH.
types: .venv/test
	$(BIN)/mypy whispercache tests benchmarks
	$(BIN)/mypy examples
	PATH="$(CURDIR)/$(BIN):$$PATH" pyright --verifytypes whispercache --ignoreexternal

layers: .venv/test
	$(BIN)/lint-imports

unit: .venv/test .venv/browser
	$(PYTEST) -m "not cluster"

# One process: there is one cluster, and it has the machine to itself.
cluster: .venv/test
	$(BIN)/pytest -m cluster --durations=5

quick: .venv/test
	$(PYTEST) -m "not process and not browser and not stress and not slow"

docs: .venv/test
	$(BIN)/python -m sphinx -q -W --keep-going -b dirhtml docs build/docs

# Apart from `make test`, since it sets up three more environments.
others: others-pyav18 others-pyav19 others-fork

others-pyav%: .venv/others/pyav%/ready
	$(<D)/bin/pytest $(SHARED) tests/engine/test_audio.py tests/engine/test_views.py \
	    tests/dropin/test_decoding.py \
	    tests/server/test_decode.py

others-fork: .venv/others/fork/ready
	! $(<D)/bin/pip show --quiet faster-whisper
	$(<D)/bin/pytest $(SHARED) -m "not slow" tests/test_model.py \
	    tests/engine/test_views.py tests/engine/test_construct.py

# Apart from `make test`, since it takes half as long again.
coverage: .venv/test .venv/browser
	$(PYTEST) -m "not cluster" --cov
	$(BIN)/pytest -m cluster --cov --cov-append --cov-report=term --cov-fail-under=95

bench: .venv/bench
	$(RUN) benchmarks/cold.py
	$(RUN) benchmarks/imports.py
	$(RUN) benchmarks/hit_path.py
	$(RUN) benchmarks/queueing.py
	$(RUN) benchmarks/dropin.py
	$(RUN) benchmarks/switch.py
	$(RUN) benchmarks/decode.py
	$(RUN) benchmarks/audio_memory.py 5 30
	$(RUN) benchmarks/calls.py
	$(RUN) benchmarks/overlap.py
	$(RUN) benchmarks/over_time.py
	$(RUN) benchmarks/simulate
	$(RUN) benchmarks/serve.py
	$(RUN) benchmarks/overhead.py

# Apart from `make bench`, since it needs the programs.
bench-apps: .venv-apps/apps
	XDG_CACHE_HOME="$(CURDIR)/examples/.cache" .venv-apps/bin/python benchmarks/apps.py

# Apart from `make bench`, since it needs Ray, and takes a quarter of an hour.
bench-cluster: .venv/test
	$(RUN) benchmarks/cluster.py

apps: .venv-apps/apps $(if $(TORCH),.venv-apps/torch)
	.venv-apps/bin/pytest tests/apps --durations=10

clients: .venv-clients/clients
	.venv-clients/bin/pytest tests/clients --durations=10

# Twelve times what an ordinary run tries, a hundred thousand steps of the state machine
# among it: minutes, not for every run.
soak: .venv/test
	WHISPERCACHE_EFFORT=12 $(PYTEST) -m soak --timeout=3600

# Its results are for the repository: the card and the date are in their names.
gpu: .venv/test .venv/cublas
	$(BIN)/pytest tests/gpu/test_gpu.py -rs
	$(BIN)/python benchmarks/gpu --write

clean:
	rm -rf .venv .venv-apps .venv-clients .coverage .coverage.* .hypothesis \
	    .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist \
	    examples/.cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/pip .venv-apps/pip .venv-clients/pip: %/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "whispercache needs Python 3.10 or later; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $*
	$*/bin/pip install --quiet --upgrade 'pip>=25.1' # the first with --group
	@touch $@

.venv/demo: .venv/pip pyproject.toml
	$(BIN)/pip install --quiet --editable '.[demo]'
	@touch $@

.venv/test: .venv/pip pyproject.toml
	$(BIN)/pip install --quiet --editable '.[demo,ray,compare]' --group test
	@touch $@

.venv/others/%/python: | .venv/pip
	@test -n "$(NEWER)" || \
	    { echo "this needs Python 3.12 or later; try NEWER=/path/to/python"; exit 1; }
	$(NEWER) -m venv --clear $(@D)
	@touch $@

.venv/others/pyav%/ready: .venv/others/pyav%/python pyproject.toml Makefile
	$(@D)/bin/$(INSTALL) --editable '.[server,compare]' 'av==$*.*' $(OTHERS)
	@touch $@

# As docs/install.md says.
.venv/others/fork/ready: .venv/others/fork/python pyproject.toml Makefile
	$(@D)/bin/$(INSTALL) faster-whisper2
	$(@D)/bin/$(INSTALL) --no-deps --editable .
	$(@D)/bin/$(INSTALL) av ctranslate2 filelock huggingface-hub nvidia-ml-py \
	    platformdirs psutil rich tomli jiwer $(OTHERS)
	@touch $@

# The page and the report are tested in a real browser. Where it may, this installs one.
.venv/browser: .venv/pip
	@command -v chromium > /dev/null || { \
	    test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
	    apt-get update -qq && \
	    apt-get install -qq --no-install-recommends chromium > /dev/null; \
	} || echo "there is no chromium here: tests in a browser will be skipped"
	@touch $@

.venv/cublas: .venv/pip
	$(BIN)/pip install --quiet nvidia-cublas-cu12
	@touch $@

.venv/bench: .venv/pip pyproject.toml
	$(BIN)/pip install --quiet --editable '.[demo,server]' --group bench
	@touch $@

.venv-apps/apps: .venv-apps/pip pyproject.toml
	.venv-apps/bin/$(INSTALL) --editable '.[demo]' --group apps
	.venv-apps/bin/$(INSTALL) --no-deps --group apps-alone
	@touch $@

.venv-clients/clients: .venv-clients/pip pyproject.toml tests/clients/package.json
	.venv-clients/bin/$(INSTALL) --editable '.[demo,server]' --group clients
	cp tests/clients/package.json .venv-clients
	.venv-clients/bin/npm install --prefix .venv-clients --no-package-lock --silent
	@touch $@

.venv-apps/torch: .venv-apps/apps
	.venv-apps/bin/$(INSTALL) --group apps-torch
	@touch $@
