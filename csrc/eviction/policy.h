// The interface of eviction policies: which cached block to evict next. A policy sees ids and lifetimes only; it knows
// no token, no memory and no device, so one policy serves every tier. Every call takes amortised O(1), and only
// reserve() allocates.
//
// A cached block has a small id, which may be used again after evict(). A block is in use while a sequence or pin needs
// it; once released it may become the victim. The blocks of a sequence are released last block first, so under plain
// recency a prefix outlives its extensions.
//
// The undo_ functions and restore() undo one call each, the latest first, so that a failed call of the allocator leaves
// the eviction order as it was.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/digest.h"
#include "base/types.h"

namespace kvmem {

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  // Allows ids below `ids`. Called before the first insert() and whenever there are more ids. May throw std::bad_alloc;
  // every other call needs no memory.
  virtual void reserve(i64 ids) = 0;
  // Block `id` becomes cached, in use. `key` identifies its content: equal when the content returns after an eviction,
  // and equal for two contents with probability 2^-64. `parent` is the id of the block before it in its chain, -1 at
  // the start; while this block is cached, that id stands for no other content. A parent stays cached as long as its
  // children, except under a sliding window, which may evict the parent first, or may insert it again while the child
  // is cached.
  virtual void insert(i32 id, std::uint64_t key, i32 parent) = 0;
  // Undoes insert(). REQUIRES: the block is in use.
  virtual void undo_insert(i32 id, std::uint64_t key, i32 parent) = 0;
  // A hint that insert() of this id and key will likely follow: prefetches what insert() reads. Changes nothing.
  virtual void expect(i32, std::uint64_t) {}
  // A hint that use() or release() of this id will follow: prefetches likewise.
  virtual void prefetch(i32) const {}
  // A new sequence reuses the block, whether it is in use or not. Follows insert(); called for the first block of a
  // chain first.
  virtual void hit(i32 id) = 0;
  // A released block is in use again: victim() does not return it until it is released. REQUIRES: it is released.
  virtual void use(i32 id) = 0;
  // Undoes use(), with no other call in between but those undone already. The block has the same position in the order
  // as before, and the policy has learned nothing from the call.
  virtual void undo_use(i32 id) = 0;
  // A block that was in use is released: no sequence and no pin needs it any more.
  virtual void release(i32 id) = 0;
  // Undoes release(): the block is in use. If a use() before it is undone too, the block returns to the position from
  // which that use() removed it.
  virtual void undo_release(i32 id) = 0;
  // Returns the released block to evict next, -1 if there is none. It may reorder the policy's lists; the answer stays
  // the same until another call.
  virtual i32 victim() = 0;
  // Returns a counter that changes when the passage of time may have changed the order. That is not undone.
  virtual i64 aged() const { return 0; }
  // Adds the eviction order to `hash`. What the policy has learned is not included, because a call that fails may add
  // to it.
  virtual void digest(Hasher& hash) const = 0;
  // A released block leaves the cache, mostly the victim, but it may be any other. `key` and `parent` as in insert().
  virtual void evict(i32 id, std::uint64_t key, i32 parent) = 0;
  // Undoes evict(): the block is released, at its former position.
  virtual void restore(i32 id, std::uint64_t key, i32 parent) = 0;
};

// Returns a new policy of this name; throws SpecError, which lists the known names, for any other.
std::unique_ptr<EvictionPolicy> make_eviction_policy(const std::string& name);
// Returns the known names, the default first.
std::vector<std::string> eviction_policy_names();

// The registry of make_eviction_policy(): one function and one file for each policy.
std::unique_ptr<EvictionPolicy> make_lru_policy();      // lru.cpp
std::unique_ptr<EvictionPolicy> make_density_policy();  // density.cpp

}  // namespace kvmem
