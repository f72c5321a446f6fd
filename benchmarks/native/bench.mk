# make floor, make callgrind: the two programs beside `python -m kvmem.bench step`, and their instruction counts.
# make mapping: the one beside `python - m kvmem.bench mapping`.

BENCH := build/bench
BENCH_FLAGS := -O3 -g -DNDEBUG -std=c++17 -Wall -Wextra -fno-strict-aliasing -pthread -Icsrc -Ibenchmarks/native -flto=auto
BENCH_CORE := $(addprefix $(BENCH)/,$(CORE_OBJECTS))

.PHONY: floor callgrind mapping
floor: $(BENCH)/floor  ## compile the C++ floor that `bench step` compares with

mapping: $(BENCH)/mapping  ## compile what `bench mapping` times without Python

# No -march=native: valgrind knows fewer instructions than the newest machine.
$(BENCH)/%.o: %.cpp benchmarks/native/bench.mk
	@mkdir -p $(@D)
	$(CXX) $(BENCH_FLAGS) -MMD -MP -c $< -o $@

$(BENCH)/floor: $(BENCH)/benchmarks/native/floor.o
	$(CXX) $(BENCH_FLAGS) $^ -o $@

$(BENCH)/core: $(BENCH)/benchmarks/native/core.o $(BENCH_CORE)
	$(CXX) $(BENCH_FLAGS) $^ -ldl -o $@

$(BENCH)/mapping: $(BENCH)/benchmarks/native/mapping.o $(BENCH_CORE)
	$(CXX) $(BENCH_FLAGS) $^ -ldl -o $@

-include $(shell find $(BENCH) -name '*.d' 2>/dev/null)

callgrind: $(BENCH)/core $(READY)  ## count the core's instructions, compare with docs/results/instructions.json
	$(PY) -m kvmem.bench instructions $(ARGS)
