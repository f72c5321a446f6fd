// What one world is made of: drawn from its seed alone.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "allocator/allocator.h"
#include "driver/checked_driver.h"
#include "soak_random.h"

namespace kvmem_soak {

// Promises that a world holds the allocator to, beside what it always checks.
struct Promises {
  bool pins = true;    // a pinned prefix is found at its pinned length until unpin()
  bool events = true;  // what the events say is cached is what match() finds
  bool stats = true;   // cached bytes are mapped, look-ups count admissions that happened
  bool states = true;  // a live sequence's snapshot and window are found right after they are made
  bool finite = true;  // with a guard, nothing behind a sequence's tokens was written by anyone
};

struct Params {
  Params(u64 world_seed, bool is_paged);

  std::string text() const;
  // `paged`: of the allocator asked about, since two on one pool may be of different kinds.
  kvmem::Geometry geometry(bool paged) const;
  kvmem::PrefixOptions prefix() const;

  u64 seed;
  bool paged, second_paged;
  i64 page_bytes, pages, most_pages, max_sequences, max_tokens, cached_rows, guard_tokens, ahead_tokens;
  kvmem::Zero zero;
  std::vector<kvmem::GroupGeometry> groups;  // without what depends on the kind of table
  std::string policy;
  bool shares, partial, recording, faults, careful, debug, eager_states, create_ahead, timed;
  int hash_bits, allocators;
  i64 event_capacity, salts, alphabet, operations;
  std::vector<i64> weights;  // of the operations, as soak_world.cpp lists them

 private:
  void draw_groups(Random& random);
  void draw_memory(Random& random);
};

}  // namespace kvmem_soak
