# `make imp` and `make test` set up a bare Linux machine: a virtual environment in .venv, then the job.
# A second run starts at once. What is installed is the set in constraints/, the same in any month;
# `make constraints` renews it.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTHON := python3 python3.13 python3.12 python3.11
PINS   := constraints/$$version.txt
PARTS := kernels engine+experiments+bench sparse+models+report+measure+theory
TRITON_TESTS := compile sass dry races bitmask block_conv2d block_linear csr_lanes linear_grad_update \
  magnitude_threshold masked_conv2d masked_linear masked_update replica_parts slot_linear hash_weights seed_linear seed_conv2d
GPU_PYTHON := build/gpu-env/bin/python
SECONDS_OF_BUNDLE := 3600
TOUR := build/tour
CASES := 10000
SEED := 0
NATIVE_TESTS := native activations batch_norm csr_linear csr_tiled sparse_conv2d sparse_conv2d_rows depthwise_rows max_pool_rows \
  plane_parts step_parts token_parts rotary token_attention self_attention masked_update hash_weights score_update seed_linear seed_conv2d subset_sum

.PHONY: imp tour test test-oldest test-newest check bench bench-bars same-bits science soak properties kill-test \
  ray-test sanitize mutants \
  fuzz constraints \
  gpu-dry gpu-bundle clean
.DEFAULT_GOAL := help

help:
	@echo "make imp      set up, then find winning tickets in LeNet-5: sparselth imp --model lenet5"
	@echo "make tour     set up, then all experiments on MNIST-1D in ten minutes: docs/tour.md"
	@echo "make test     set up, then run the tests"
	@echo "make test-oldest, make test-newest  the tests with the lower bounds, with what is newest"
	@echo "make check    set up, then ruff and mypy"
	@echo "make bench    set up, then the benchmarks"
	@echo "make bench-bars  set up with the rivals, then whole networks beside their goals (ONLY=ViT: some)"
	@echo "make same-bits BEFORE=REV  set up, then hold HEAD against that revision: bits, bench, steps"
	@echo "make science  set up, then the tests that train for minutes"
	@echo "make soak     set up, then a run of 100,000 cells that cost nothing: stopped, gone on with, damaged"
	@echo "make properties  set up, then the kernels' property tests with 2,000 cases each, and 500 random networks converted"
	@echo "make kill-test  set up, then kill runs at 200 moments and compare what they come to"
	@echo "make ray-test  set up with Ray, then sweeps on a local cluster of two nodes, with workers and the head killed"
	@echo "make sanitize set up, then the native kernels' tests under the address and undefined-behaviour sanitizers"
	@echo "make mutants ROOMS=\"config train\"  plant small faults into rooms of pure Python; which no test notices"
	@echo "make fuzz     set up, then 10,000 mutated tickets, runs, configurations, caches and data files"
	@echo "make gpu-dry  what can be known of the GPU kernels without a GPU: compile gates, dry launches, races"
	@echo "make gpu-bundle  compile the kernels for a GPU machine, build/gpu-bundle.tar.xz (needs python3.12; an hour)"
	@echo "make constraints  renew what is installed: constraints/VERSION.txt of every Python found"
	@echo "make clean    remove .venv, .venv-oldest and .venv-newest"
	@echo "PYTHON=PATH VENV=FOLDER choose another interpreter and place"

imp: $(STAMP)
	@echo "== sparselth imp --model lenet5 (stop with Ctrl-C; the next 'make imp' goes on)"
	@$(BIN)/sparselth imp --model lenet5 --resume

# The commands of the page, in their order, in a folder TOUR; one that was stopped goes on, one that is finished is
# shown. What each took is said at the end, or where one fails.
tour: $(STAMP)
	@mkdir -p $(TOUR)
	@sed -n 's/^    sparselth /sparselth /p' docs/tour.md | sed 's/ --out / --resume --out /' >$(TOUR)/commands
	@cd $(TOUR) && PATH="$(abspath $(BIN)):$$PATH" && : >times && all=0 && code=0 && \
	while read -r command <&3; do \
	  echo; echo "== $$command"; began=$$(date +%s); \
	  $$command || code=$$?; \
	  took=$$(($$(date +%s) - began)); all=$$((all + took)); \
	  printf '%5d s  %s\n' $$took "$$command" >>times; \
	  [ $$code = 0 ] || break; \
	done 3<commands; \
	echo; cat times; printf '%5d s  in all\n' $$all; exit $$code

# In four parts beside each other, each in a process of its own: two cores have enough to do while one part waits
# for runs that it kills. PARTS are folders of tests; all else is the part whose progress is shown.
test: $(STAMP)
	@echo "== pytest, four parts at a time: here is one, what the others said comes after it"
	@logs=$$(mktemp -d); trap 'rm -rf "$$logs"' EXIT; pids=; \
	for part in $(PARTS); do \
	  $(BIN)/python -m pytest -q -m "not science" $$(echo "tests/$$part" | sed 's#+# tests/#g') \
	    -o cache_dir=.pytest_cache/$$part >"$$logs/$$part" 2>&1 & pids="$$pids $$!"; \
	done; \
	$(BIN)/python -m pytest -q -m "not science" tests $(patsubst %,--ignore tests/%,$(subst +, ,$(PARTS))); code=$$?; \
	for pid in $$pids; do wait $$pid || code=1; done; \
	for part in $(PARTS); do echo "== $$part"; cat "$$logs/$$part"; done; exit $$code

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest bench --benchmark-only -q

# ONLY=PART of a name; what was measured is kept in build/bars, AGAIN=--again measures it again.
bench-bars: $(STAMP)
	@$(BIN)/python -c 'import onnx, onnxruntime, onnxscript, openvino' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[rivals]'
	@$(BIN)/python bench/bars.py --only "$(ONLY)" $(AGAIN)

# SPARSELTH_DATA=FOLDER where MNIST, Fashion-MNIST and CIFAR-10 lie; runs on what is not there are left out.
same-bits: $(STAMP)
	$(BIN)/python bench/same_bits.py $(BEFORE)

science: $(STAMP)
	$(BIN)/python -m pytest -q -m science

soak: $(STAMP)
	$(BIN)/python tests/soak.py

properties: $(STAMP)
	SPARSELTH_CASES=2000 SPARSELTH_EVERY=1 $(BIN)/python -m pytest -q tests/kernels tests/test_optim.py
	SPARSELTH_GRAPHS=500 $(BIN)/python -m pytest -q tests/sparse/test_graphs.py

# CASES=N and SEED=N: others. What it tried and what it lost is printed; a short form runs in `make test`.
fuzz: $(STAMP)
	@PYTHONPATH=.:tests/fuzz $(BIN)/python tests/fuzz/fuzz.py --cases $(CASES) --seed $(SEED)

# SPARSELTH_KILLS kills at events, and as many at moments in time.
kill-test: $(STAMP)
	SPARSELTH_KILLS=100 $(BIN)/python -m pytest -q -s tests/experiments/test_kill.py tests/cli/test_signals.py

ray-test: $(STAMP)
	@$(BIN)/python -c 'import ray' 2>/dev/null || $(BIN)/python -m pip install --quiet \
	  --disable-pip-version-check --no-build-isolation --editable '.[ray]'
	$(BIN)/python -m pytest -q tests/cluster/test_ray.py

# All levels, AVX-512 made of AVX2's vectors, in a library of its own.
sanitize: $(STAMP)
	mkdir -p build
	$(CC) -std=gnu11 -O1 -g -fPIC -shared -fno-omit-frame-pointer -ffp-contract=fast -Wall -Wextra -Wno-psabi \
	  -fsanitize=address,undefined -fno-sanitize-recover=all -DALL_LEVELS -fopenmp \
	  kernels/native/native.c -o build/native_sanitized.so
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 SPARSELTH_NATIVE_LIB=$(CURDIR)/build/native_sanitized.so SPARSELTH_EVERY=1 \
	  $(BIN)/python -m pytest -q $(wildcard $(NATIVE_TESTS:%=tests/kernels/test_%.py)) -k "not triton and not wide"

# ROOMS: all of [tool.mutmut.rooms] in pyproject.toml unless named. What was tried is kept in build/mutants/.
mutants: $(STAMP)
	@$(BIN)/python -c 'import mutmut' 2>/dev/null || $(BIN)/python -m pip install --quiet \
	  --disable-pip-version-check --no-build-isolation --editable '.[mutants]'
	@$(BIN)/python tests/mutants.py $(ROOMS)

# The ends of the ranges in pyproject.toml: each lower bound, on the oldest Python it allows; whatever is newest.
test-oldest:
	@mkdir -p build
	@sed -nE 's/^ *"?([a-z0-9-]+)>=([0-9.]+(post[0-9]+)?)".*/\1==\2/p' pyproject.toml >build/oldest.txt
	@$(MAKE) test VENV=.venv-oldest PYTHON="python3.11 python3" PINS=build/oldest.txt

test-newest:
	@$(MAKE) test VENV=.venv-newest PYTHON="python3.13 python3.12 python3" PINS=/dev/null

# What pip would install today on every Python that is found; nothing is installed.
constraints:
	@mkdir -p build; \
	for version in 3.11 3.12 3.13; do \
	  for python in python$$version $(HOME)/.pyenv/versions/$$version.*/bin/python3; do \
	    $$python -m pip --version >/dev/null 2>&1 || continue; \
	    $$python -m pip install --quiet --dry-run --ignore-installed --report build/pins.json '.[dev]' || exit 1; \
	    $$python -c 'import json; \
found = [i["metadata"] for i in json.load(open("build/pins.json"))["install"] if "dir_info" not in i["download_info"]]; \
print(*sorted("{name}=={version}".format(**i).lower() for i in found), sep="\n")' >constraints/$$version.txt; \
	    echo "constraints/$$version.txt: $$(wc -l <constraints/$$version.txt) packages"; break; \
	  done; \
	done

# With the device's Triton, 3.6, too: every launch at target, large and odd shapes compiled, every kernel's machine
# code held to its limits, every test of a kernel watched for races.
gpu-dry: $(STAMP)
	@time=$$(date +%s); said() { now=$$(date +%s); echo "== $$((now - time)) s"; time=$$now; }; \
	echo "== dry launches, compiled for sm_90 by Triton 3.6"; \
	triton=$$($(BIN)/python tests/kernels/triton_of_the_device.py) && \
	PYTHONPATH="$$triton:." $(BIN)/python tests/kernels/dry.py --compile; dry=$$?; said; \
	echo "== machine code by both Tritons, grids, and races in the interpreter"; \
	SPARSELTH_EVERY=1 $(BIN)/python -m pytest -q --durations=15 $(TRITON_TESTS:%=tests/kernels/test_%.py); tests=$$?; said; \
	exit $$((dry | tests))

# GPU_PYTHON=PATH: a CPython 3.12 that has torch 2.11, Triton 3.6 and what the tests need. It compiles in the order
# of a visit's stages; after SECONDS_OF_BUNDLE it packs what it has.
gpu-bundle: $(GPU_PYTHON)
	@PYTHONPATH=.:bench:tests/kernels $(GPU_PYTHON) -m gpu.bundle --seconds $(SECONDS_OF_BUNDLE)

build/gpu-env/bin/python:
	@python=$$(command -v python3.12 || ls $(HOME)/.pyenv/versions/3.12.*/bin/python3.12 2>/dev/null | tail -n 1); \
	$$python -c '' 2>/dev/null || python=$$(ls $(HOME)/.pyenv/versions/3.12.*/bin/python3.12 2>/dev/null | tail -n 1); \
	if [ -z "$$python" ]; then \
	  echo "make: gpu-bundle needs Python 3.12, as the GPU machine has it (or GPU_PYTHON=PATH)" >&2; exit 1; \
	fi; \
	echo "== setting up build/gpu-env: torch 2.11 and Triton 3.6, about 5 GB"; \
	$$python -m venv build/gpu-env && build/gpu-env/bin/python -m pip install --quiet --disable-pip-version-check \
	  torch==2.11.0 triton==3.6.0 numpy pytest hypothesis click rich safetensors matplotlib || \
	  { rm -rf build/gpu-env; exit 1; }

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest

# The interpreter: the first of PYTHON that runs, has venv, and is 3.11 to 3.13.
$(STAMP): pyproject.toml setup.cfg setup.py $(wildcard kernels/native/* constraints/*)
	@set -e; \
	for python in $(PYTHON); do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	      >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "make: needs Python 3.11 to 3.13 with its venv module (Debian: apt install python3 python3-venv)" >&2; \
	  exit 1; \
	fi; \
	echo "== setting up $(VENV) with $$($$found --version): torch and what else is needed, about 5.5 GB, 2 minutes"; \
	[ -x $(BIN)/python ] || $$found -m venv $(VENV); \
	version=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	pip="$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS)"; \
	$$pip 'setuptools>=77.0.3'; \
	$$pip --no-build-isolation --editable '.[dev]'; \
	touch $(STAMP); \
	echo "== set up"
