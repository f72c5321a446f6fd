# make test-sanitize: the core under AddressSanitizer with UBSan, and under ThreadSanitizer.
#
#   STRESS_SECONDS=20   how long each stress run lasts      STRESS_SEED=1234   repeat one
#   SOAK_SECONDS=10     how long random worlds are tried    SOAK_ARGS=   more words for them
#
# The program tests/native/stress/stress.cpp takes `--seed N --seconds S`, prints both, ends with 0 when every pattern it left in memory
# was still there, and reserves at most 256 GiB of addresses: ThreadSanitizer has no room for more.
#
# Four parts: canaries (planted bugs: a sanitizer that reports nothing must be noticed), the C++ stress program with all
# of csrc/ but the bindings, the same code with every allocation of every call failing in turn (tests/native/stress/no_memory.cpp),
# and the Python tests marked `core` on a native module built with the sanitizers.

STRESS_SECONDS ?= 20
SOAK_SECONDS ?= 10
STRESS_SEED ?= $(shell date +%s)

SAN := build/sanitize
SOAK := $(patsubst %.cpp,%.o,$(wildcard tests/native/stress/soak*.cpp))
# -g1: functions and lines, which a report names. A fifth quicker to compile than -g.
SAN_FLAGS := -std=c++17 -O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all -pthread -Icsrc -DKVMEM_DEBUG \
  -Wall -Wextra -Werror
SAN_asan := address,undefined
SAN_tsan := thread

export TSAN_OPTIONS := halt_on_error=1 second_deadlock_stack=1
# ThreadSanitizer wants the address space laid out as it expects; a kernel that randomises more than that breaks it.
NO_ASLR := $(shell setarch -R true 2>/dev/null && echo setarch -R)
RUN_asan := ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1
RUN_tsan := $(NO_ASLR)

# Python and torch are not instrumented: races between our own code and itself are found, wherever Python's lock is not
# held. The suppression is of glibc, which frees a dead thread's storage in the thread that joins it.
TSAN_PYTHON = $(NO_ASLR) env LD_PRELOAD="$(shell $(CXX) -print-file-name=libtsan.so) $(shell $(CXX) -print-file-name=libstdc++.so.6)" \
  TSAN_OPTIONS="$(TSAN_OPTIONS) suppressions=$(CURDIR)/$(SAN)/tsan.supp" PYTHONSAFEPATH=1 \
  PYTHONPATH=$(CURDIR)/$(SAN)/tsan-python KVMEM_EXPECT_CORE=$(CURDIR)/$(SAN)/tsan-python
TSAN_TESTS := tests/threads/test_locks.py tests/threads/test_threads.py tests/threads/test_threads_stale.py \
  tests/memory/test_mapper.py tests/events/test_events_allocator.py tests/threads/test_interrupts.py \
  tests/allocator/test_arrays_read_once.py::test_arrays_that_another_thread_writes_to

# Leaks are looked for in the stress program only: torch has thousands that are not ours. Segmentation faults keep their
# signal, because some tests ask for exactly that.
# libstdc++ is preloaded beside it: python does not link it, and without it the runtime finds no __cxa_throw to intercept
# and ends the process at the first exception of ours.
ASAN_LIBRARIES = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so.6)
ASAN_PYTHON = env LD_PRELOAD="$(ASAN_LIBRARIES)" ASAN_OPTIONS=detect_leaks=0:handle_segv=0:allocator_may_return_null=1 \
  PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(SAN)/python KVMEM_EXPECT_CORE=$(CURDIR)/$(SAN)/python

.PHONY: test-sanitize test-canaries test-stress test-soak test-no-memory test-asan-python test-tsan-python sanitize-programs tsan-programs asan-module
test-sanitize: test-canaries test-stress test-no-memory test-asan-python  ## C++ stress program and core tests under the sanitizers

sanitize-programs: tsan-programs $(SAN)/asan/canary $(addprefix $(SAN)/asan/tests/native/stress/,stress soak no_memory)  ## compile them, no more (make -j2)

tsan-programs: $(SAN)/tsan/canary $(SAN)/tsan/tests/native/stress/stress  # without $(READY): they need no Python

# A folder's sources are compiled as one unit, as setup.py does.
CORE_SOURCES := $(CORE_OBJECTS:.o=.cpp)
APART := csrc/eviction/statistics.cpp
CORE_FOLDERS := $(patsubst csrc/%/,%,$(sort $(dir $(CORE_SOURCES))))
CORE_UNITS := $(CORE_FOLDERS:%=build/units/%.o) $(APART:.cpp=.o)

# The Python module's objects serve the programs too: under AddressSanitizer the core is compiled once. setup.py knows
# what is out of date; the archive is written only when it differs, so that nothing is linked for no reason.
asan-module: $(READY)
	KVMEM_DEBUG=1 KVMEM_SANITIZE=$(SAN_asan) $(PY) setup.py -q build --build-base $(SAN)/objects --build-lib $(SAN)/python

$(SAN)/asan/core.a: asan-module
	@mkdir -p $(@D) && rm -f $@.new
	nanobind=$$($(PY) -c "import nanobind; print(nanobind.__version__)") && \
	  cd $(SAN)/objects/temp.*-nanobind$$nanobind-debug-address-undefined && \
	  $(AR) rcsD $(CURDIR)/$@.new $(CORE_UNITS)
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

CORE_asan := $(SAN)/asan/core.a
CORE_tsan := $(addprefix $(SAN)/tsan/,$(CORE_UNITS))
LINK_SANITIZED = -Wl,--whole-archive $^ -Wl,--no-whole-archive -pthread -ldl -o $@

define tsan_unit  # $(1) is a folder of csrc
$(SAN)/tsan/build/units/$(1).o: $(filter-out $(APART),$(wildcard csrc/$(1)/*.cpp)) tests/native/sanitize.mk
	@mkdir -p $$(@D)
	printf '#include "%s"\n' $$(patsubst csrc/%,%,$$(filter %.cpp,$$^)) | \
	  $$(CXX) $(SAN_FLAGS) -fsanitize=$(SAN_tsan) -MMD -MP -MF $$(@:.o=.d) -MT $$@ -x c++ -c - -o $$@
endef
$(foreach folder,$(CORE_FOLDERS),$(eval $(call tsan_unit,$(folder))))

define sanitized  # $(1) is asan or tsan
$(SAN)/$(1)/%.o: %.cpp tests/native/sanitize.mk
	@mkdir -p $$(@D)
	$$(CXX) $(SAN_FLAGS) -fsanitize=$(SAN_$(1)) -MMD -MP -c $$< -o $$@

$(SAN)/$(1)/canary: $(SAN)/$(1)/tests/native/stress/canary.o
	$$(CXX) -fsanitize=$(SAN_$(1)) -pthread $$^ -o $$@

$(addprefix $(SAN)/$(1)/tests/native/stress/,stress no_memory): %: %.o $(CORE_$(1))
	$$(CXX) -fsanitize=$(SAN_$(1)) $$(LINK_SANITIZED)

$(SAN)/$(1)/tests/native/stress/soak: $(addprefix $(SAN)/$(1)/,$(SOAK)) $(CORE_$(1))
	$$(CXX) -fsanitize=$(SAN_$(1)) $$(LINK_SANITIZED)

.PHONY: test-stress-$(1)
test-stress-$(1): $(SAN)/$(1)/tests/native/stress/stress
	$$(RUN_$(1)) timeout -k 10 $$$$(($(STRESS_SECONDS) * 3 + 60)) $$< --seed $(STRESS_SEED) --seconds $(STRESS_SECONDS)
endef
$(eval $(call sanitized,asan))
$(eval $(call sanitized,tsan))
-include $(shell find $(SAN)/asan $(SAN)/tsan -name '*.d' 2>/dev/null)
.SECONDARY:

$(SAN)/canary.so $(SAN)/canary-tsan.so: tests/native/stress/canary.cpp tests/native/sanitize.mk
	@mkdir -p $(@D)
	$(CXX) $(SAN_FLAGS) -fsanitize=$(if $(findstring tsan,$@),$(SAN_tsan),$(SAN_asan)) -fPIC -shared $< -o $@

# $(call must_report,COMMAND,WORDS): the command fails, and says so in a sanitizer's words.
define must_report
	@if $(1) > $(SAN)/canary.log 2>&1 || ! grep -q $(2) $(SAN)/canary.log; then \
	  cat $(SAN)/canary.log; echo "a planted bug went unnoticed:" $(2); exit 1; fi
	@echo "planted bug reported: "$(2)
endef

test-canaries: $(SAN)/asan/canary $(SAN)/tsan/canary $(SAN)/canary.so $(READY)
	$(call must_report,$(RUN_asan) $(SAN)/asan/canary overflow,"heap-buffer-overflow")
	$(call must_report,$(RUN_asan) $(SAN)/asan/canary undefined,"signed integer overflow")
	$(call must_report,$(RUN_asan) $(SAN)/asan/canary leak,"detected memory leaks")
	$(call must_report,$(RUN_tsan) $(SAN)/tsan/canary race,"data race")
	$(call must_report,$(ASAN_PYTHON) $(PY) -c "import ctypes; ctypes.CDLL('$(SAN)/canary.so').overflow()","heap-buffer-overflow")

test-stress: test-stress-asan test-stress-tsan test-soak

# Random worlds on both backends; one thread and its mapper, so ThreadSanitizer has little to see there.
test-soak: $(SAN)/asan/tests/native/stress/soak
	$(RUN_asan) timeout -k 10 $$(($(SOAK_SECONDS) * 3 + 60)) $< --operations 1000000000 --seconds $(SOAK_SECONDS) \
	  --seed $(STRESS_SEED) $(SOAK_ARGS)


# Its operator new takes the sanitizer's place, which still sees all that malloc gives. 200 steps: about half a minute.
test-no-memory: $(SAN)/asan/tests/native/stress/no_memory $(SAN)/libcuda_stub.so
	$(RUN_asan) timeout -k 10 600 $< --seed $(STRESS_SEED) --steps 200
	$(RUN_asan) KVMEM_STUB_GRANULARITY_BYTES=4096 timeout -k 10 600 $< --seed $(STRESS_SEED) --steps 60 \
	  --libcuda $(CURDIR)/$(SAN)/libcuda_stub.so

# The stand-in for libcuda with an operator new of its own: memory fails in our code only.
$(SAN)/libcuda_stub.so: $(filter-out %check_abi.cpp,$(wildcard tests/native/cuda_stub/*.cpp)) $(wildcard tests/native/cuda_stub/*.h)
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -g -fPIC -shared -Wl,-Bsymbolic -static-libstdc++ -Icsrc $(filter %.cpp,$^) -pthread -o $@

# PYTHONPATH comes before an installed kvmem, PYTHONSAFEPATH (Python 3.11) keeps the checkout out of the path of every
# `python -c` that a test starts, and tests/conftest.py refuses to start if another module was loaded all the same.
test-asan-python: asan-module
	$(ASAN_PYTHON) $(BIN)pytest -p no:cacheprovider -m "core and not gpu" \
	  $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist worksteal) $(ARGS)

# Minutes, so it is no part of test-sanitize.
test-tsan-python: $(SAN)/canary-tsan.so $(READY)  ## tests with threads on a native module built with ThreadSanitizer
	@echo "race:_dl_deallocate_tls" > $(SAN)/tsan.supp
	$(call must_report,$(TSAN_PYTHON) $(PY) -c "import ctypes; ctypes.CDLL('$(SAN)/canary-tsan.so').race()","data race")
	KVMEM_DEBUG=1 KVMEM_SANITIZE=$(SAN_tsan) $(PY) setup.py -q build --build-base $(SAN)/objects --build-lib $(SAN)/tsan-python
	$(TSAN_PYTHON) $(BIN)pytest -p no:cacheprovider $(TSAN_TESTS) $(ARGS)
