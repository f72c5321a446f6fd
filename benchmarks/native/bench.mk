# make floor, make callgrind: the C++ baseline beside `python -m benchmarks.step`, and instruction counts of the core.
# make mapping: the part of `python -m benchmarks.memory mapping` that runs without Python.

BENCH := build/bench
BENCH_FLAGS := -O3 -g -DNDEBUG -std=c++17 -Wall -Wextra -fno-strict-aliasing -pthread -Icsrc -Ibenchmarks/native -flto=auto
BENCH_CORE := $(addprefix $(BENCH)/,$(CORE_OBJECTS))

.PHONY: floor callgrind mapping
floor: $(BENCH)/floor  ## compile the C++ baseline of `python -m benchmarks.step`

mapping: $(BENCH)/mapping core  ## time mapping a run of pages beside a bare mmap, with and without Python
	$(PY) -m benchmarks.memory mapping $(ARGS)

# No -march=native: valgrind knows fewer instructions than the newest machine.
$(BENCH)/%.o: %.cpp benchmarks/native/bench.mk
	@mkdir -p $(@D)
	$(CXX) $(BENCH_FLAGS) -MMD -MP -c $< -o $@

$(BENCH)/floor: $(BENCH)/benchmarks/native/floor.o
	$(CXX) $(BENCH_FLAGS) $^ -o $@

$(BENCH)/core $(BENCH)/mapping: $(BENCH)/%: $(BENCH)/benchmarks/native/%.o $(BENCH_CORE)
	$(CXX) $(BENCH_FLAGS) $^ -ldl -o $@

-include $(shell find $(BENCH) -name '*.d' 2>/dev/null)

callgrind: $(BENCH)/core $(READY)  ## count the core's instructions, compare with docs/results/instructions.json
	$(PY) -m benchmarks.instructions $(ARGS)
