# make setup   create a virtual environment in .venv with everything installed
# make train   train the debug model on the CPU (a minute on two cores)
# make test    run the test suite (JOBS=2)   make test-slow   run the tests that take minutes each (an hour in all)
# make test-layouts  train, kill, resume and reshard under every combination of degrees of parallelism (JOBS=2)
# make test-crash  test kills, errors, power cuts, restarts of jobs and hostile input, a sample of each (JOBS=2)
# make test-integrations   test the adapters with the installed frameworks: train, kill, resume
# make test-gpu    run the tests that need a CUDA device; each is skipped where there is none
# make test-integrations-slow  run those of the adapters' tests that take minutes each
# make test-netfs  test a run on a network file system, each rank with its own client (needs FUSE and permission to mount)
# make conversions   convert tiny models of every family in both directions; writes the table in docs/conversion.md
# make reliability   test kills, power cuts, damage and hostile input; writes the table in docs/reliability.md
# make soak    kill a training run's processes 50 times (SEED=, KILLS=); takes ten to twenty minutes
# make demo-s3 train on a local S3 store, kill it, resume, verify (a few minutes)
# make soak-store   kill ranks, launcher, store and network during a run on a store (SEED=, FAULTS=)
# make fuzz    feed 100,000 hostile inputs to every reader (SEED=, INPUTS=); takes a few minutes
# make test-browser   test the report in headless Chromium (Debian: apt-get install chromium npm)
# make bench   run the benchmarks; writes the table of goals in docs/performance.md (half an hour; wants a quiet machine)
# make house   print figures of the code's structure (AGAINST=<revision> compares with another revision)
# make docs    build the documentation in build/docs; warnings are errors
# make lint    check formatting, lint, types and import contracts; make format fixes the formatting
#
# Each target runs setup first if needed. PYTHON chooses the Python (3.11 or newer) for .venv.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
TITAN := .venv-torchtitan
NGPU ?= 2
JOBS ?= 2
KILLS ?= 50
FAULTS ?= 20
CONFIG_FILE ?= ./configs/debug_cpu.toml
INPUTS ?= 100000
BENCH := build/bench
# Worlds of up to eight ranks that train: a quarter of the time of all tests.
LAYOUTS := $(addprefix tests/distributed/test_,layouts.py resharding.py resume.py seed.py hf_training.py)

.PHONY: house help setup train test test-layouts test-slow test-crash test-browser test-gpu test-netfs test-integrations test-integrations-slow reliability soak soak-store demo-s3 fuzz bench docs lint format clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

setup: $(STAMP)
	@echo "ready. \`source .venv/bin/activate\` puts milepost on your PATH; ./run_train.sh and scripts/ find .venv by themselves"

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	timeout 3000 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(STAMP)
	NGPU=$(NGPU) CONFIG_FILE=$(CONFIG_FILE) timeout 3000 ./run_train.sh

test: $(STAMP)
	timeout 1800 $(BIN)/python -m pytest -q -m "not slow and not browser and not integration" -n $(JOBS) --dist loadfile \
		--ignore tests/crash --ignore tests/attacks --ignore tests/distributed/test_elastic.py $(addprefix --ignore ,$(LAYOUTS))

test-layouts: $(STAMP)
	timeout 1200 $(BIN)/python -m pytest -q -m "not slow" -n $(JOBS) --dist loadfile $(LAYOUTS)

test-crash: $(STAMP)
	timeout 1800 $(BIN)/python -m pytest -q -m "not slow" -n $(JOBS) --dist loadfile tests/crash tests/attacks \
		tests/distributed/test_elastic.py

test-slow: $(STAMP)
	timeout 7200 $(BIN)/python -m pytest -q -m slow -n $(JOBS)

test-browser: $(STAMP)
	@command -v chromium >/dev/null || echo "no Chromium on the path: apt-get install chromium; its tests are skipped" >&2
	test -e build/axe/node_modules/axe-core || timeout 300 npm install --silent --no-save --prefix build/axe axe-core
	timeout 600 $(BIN)/python -m pytest -q -m browser tests/report/test_browser.py

test-gpu: $(STAMP)
	timeout 1800 $(BIN)/python -m pytest -q -rs -m gpu tests/gpu

test-netfs: $(STAMP)
	timeout 900 $(BIN)/python -m pytest -q -rs -m slow tests/crash/test_netfs.py

test-integrations: $(STAMP) $(TITAN)/.installed
	timeout 900 $(BIN)/python -m pytest -q -m "integration and not slow" tests/integrations
	timeout 900 $(TITAN)/bin/python -m pytest -q -m "integration and not slow" -k "torchtitan or example or trackers" \
		tests/integrations/test_torchtitan.py tests/integrations/test_pages.py tests/integrations/test_trackers.py

test-integrations-slow: $(STAMP) $(TITAN)/.installed
	timeout 1200 $(BIN)/python -m pytest -q -m "integration and slow" tests/integrations
	timeout 1200 $(TITAN)/bin/python -m pytest -q -m "integration and slow" tests/integrations/test_torchtitan.py

# torchtitan needs a different torchao than torchtune, so it gets a separate environment, ahead of .venv's packages. If it
# can't be installed, its tests report that they were not run.
$(TITAN)/.installed: $(STAMP)
	test -x $(TITAN)/bin/pip || $(PYTHON) -m venv $(TITAN)
	timeout 1200 $(TITAN)/bin/python -m pip install --quiet --no-deps \
		torchtitan==0.3.0 spmd-types==0.3.1 einops==0.8.2 torchao==0.18.0 && echo installed > $(TITAN)/packages || true
	timeout 1200 $(TITAN)/bin/python -m pip install --quiet wandb==0.31.0 mlflow-skinny==3.17.2 || true
	$(BIN)/python -c 'import sysconfig; print("$(CURDIR)/src", sysconfig.get_path("purelib"), sep="\n")' \
		> $$($(TITAN)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/milepost.pth
	test -s $(TITAN)/packages || echo "torchtitan could not be installed: its tests are not run" >&2
	touch $@

reliability: $(STAMP)
	@mkdir -p build && rm -f build/tally.jsonl
	MILEPOST_TALLY=build/tally.jsonl timeout 3000 $(BIN)/python -m pytest -q -m "not slow" -n $(JOBS) --dist loadfile \
		tests/crash tests/attacks tests/distributed/test_collective_safety.py
	$(BIN)/python docs/reliability_table.py build/tally.jsonl

soak: $(STAMP)
	timeout 5400 $(BIN)/python tests/crash/soak.py --kills $(KILLS) $(if $(SEED),--seed $(SEED))

soak-store: $(STAMP)
	timeout 5400 $(BIN)/python tests/crash/store_soak.py --faults $(FAULTS) $(if $(SEED),--seed $(SEED))
	timeout 5400 $(BIN)/python tests/crash/store_soak.py --faults $(FAULTS) --tier $(if $(SEED),--seed $(SEED))

demo-s3: $(STAMP)
	timeout 1800 $(BIN)/python scripts/demo_s3.py

conversions: $(STAMP)
	@mkdir -p build && rm -f build/conversions.jsonl
	MILEPOST_CONVERSIONS=$(CURDIR)/build/conversions.jsonl timeout 900 $(BIN)/python -m pytest -q \
		tests/interop/test_families.py -k trainers_names
	$(BIN)/python docs/conversion_table.py build/conversions.jsonl

fuzz: $(STAMP)
	timeout 3000 $(BIN)/python tests/attacks/fuzz.py --inputs $(INPUTS) $(if $(SEED),--seed $(SEED))

bench: $(STAMP)
	@mkdir -p $(BENCH) && rm -f $(BENCH)/*.json
	timeout 1800 $(BIN)/python benchmarks/bench_engine.py --json $(BENCH)/engine.json
	timeout 1200 $(BIN)/python benchmarks/bench_sharded.py --json $(BENCH)/sharded.json
	timeout 1800 $(BIN)/python benchmarks/bench_async.py --json $(BENCH)/async.json
	timeout 1200 $(BIN)/python benchmarks/bench_frozen.py --json $(BENCH)/frozen.json
	timeout 1800 $(BIN)/python benchmarks/bench_small.py --json $(BENCH)/small.json
	timeout 1800 $(BIN)/python benchmarks/bench_convert.py --json $(BENCH)/convert.json
	timeout 1200 $(BIN)/python benchmarks/bench_last_save.py --json $(BENCH)/last_save.json
	timeout 1800 $(BIN)/python benchmarks/bench_store.py --only times --nbytes 1e9 --json $(BENCH)/store.json
	$(BIN)/python benchmarks/goals.py $(BENCH)

house: $(STAMP)
	$(BIN)/python docs/house.py $(if $(AGAINST),--against $(AGAINST))

docs: $(STAMP)
	$(BIN)/python docs/generate.py
	timeout 300 $(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

lint: $(STAMP)
	timeout 120 $(BIN)/ruff format --check .
	timeout 120 $(BIN)/ruff check .
	timeout 600 $(BIN)/mypy
	timeout 120 $(BIN)/lint-imports

format: $(STAMP)
	timeout 120 $(BIN)/ruff format .
	timeout 120 $(BIN)/ruff check --fix .

clean:
	rm -rf .venv $(TITAN) outputs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
