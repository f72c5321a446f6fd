# make soak: random worlds with their content checked, on the core as it is released (tests/native/stress/soak.cpp).
# `make test-sanitize` runs the same for SOAK_SECONDS under AddressSanitizer.
#
#   OPERATIONS=10000000   how many, on each backend      BACKEND=paged   on this one only
#   SEED=1234             repeat a run                   ARGS="--world N --shrink --trace"   and more words
#
# make no-memory: every allocation of random calls fails in turn (tests/native/stress/no_memory.cpp), for SEEDS seeds of a second
# each. `make test-sanitize` runs one of them under AddressSanitizer.

OPERATIONS ?= 1000000
BACKEND ?= paged virtual
SEED ?= $(shell date +%s)
SEEDS ?= 100

.PHONY: soak no-memory
soak: $(BENCH)/soak  ## millions of random operations with content checked (OPERATIONS, BACKEND, SEED)
	for backend in $(BACKEND); do \
	  $< --backend $$backend --operations $(OPERATIONS) --seed $(SEED) $(ARGS) || exit 1; done

$(BENCH)/soak: $(addprefix $(BENCH)/,$(SOAK)) $(BENCH_CORE)
	$(CXX) $(BENCH_FLAGS) $^ -ldl -o $@

no-memory: $(BENCH)/no_memory  ## every allocation of random calls fails in turn (SEEDS of them, from SEED on)
	for seed in $$(seq $(SEED) $$(($(SEED) + $(SEEDS) - 1))); do $< --seed $$seed --steps 200 > $(BENCH)/no_memory.log || \
	  { cat $(BENCH)/no_memory.log; exit 1; }; done

$(BENCH)/no_memory: $(BENCH)/tests/native/stress/no_memory.o $(BENCH_CORE)
	$(CXX) $(BENCH_FLAGS) -rdynamic $^ -ldl -o $@
