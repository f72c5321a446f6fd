# make soak: random worlds with their content checked, on the core as it is released (csrc/stress/soak.cpp).
# `make test-sanitize` runs the same for SOAK_SECONDS under AddressSanitizer.
#
#   OPERATIONS=10000000   how many, on each backend      BACKEND=paged   on this one only
#   SEED=1234             repeat a run                   ARGS="--world N --shrink --trace"   and more words

OPERATIONS ?= 1000000
BACKEND ?= paged virtual
SEED ?= $(shell date +%s)

.PHONY: soak
soak: $(BENCH)/soak  ## millions of random operations with content checked (OPERATIONS, BACKEND, SEED)
	for backend in $(BACKEND); do \
	  $< --backend $$backend --operations $(OPERATIONS) --seed $(SEED) $(ARGS) || exit 1; done

$(BENCH)/soak: $(addprefix $(BENCH)/,$(SOAK)) $(BENCH_CORE)
	$(CXX) $(BENCH_FLAGS) $^ -ldl -o $@
