// Which cached block to forget next. A policy sees numbers and lifetimes only: no token, no memory, no device, so the
// same policy serves every tier. Every call is O(1), amortised, and allocates nothing but by reserve().
//
// A block is cached under a small id, which may be given out again after evict(). While some sequence uses it, it
// stays; once released it may be the next victim. A prefix is inserted and released like any block, but blocks of one
// sequence are released last block first, so that by plain recency a prefix outlives its extensions.
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

  // Ids below `ids` may come. Called before the first and whenever there are more.
  virtual void reserve(i64 ids) = 0;
  // Block `id` is cached from now on, and in use. `key` names its content: the same when it comes back after an
  // eviction, equal for two contents with a chance of 2^-64 at most. `parent` is the id of the block before it in its
  // chain (-1 at the start), and while this one is cached the id of no other content. It stays cached as long, except
  // where a sliding window passes: then it may go before this one, be gone already, or come back.
  virtual void insert(i32 id, std::uint64_t key, i32 parent) = 0;
  // That is taken back, in reverse order if there were several: the block is in use then.
  virtual void undo_insert(i32 id, std::uint64_t key, i32 parent) = 0;
  // insert() of this id and key will likely follow: time to fetch what it looks up. Changes nothing.
  virtual void expect(i32, std::uint64_t) {}
  // use() or release() of this id will follow, likewise.
  virtual void prefetch(i32) const {}
  // Another sequence found the block, in use or not. Follows insert(); first block of the chain first.
  virtual void hit(i32 id) = 0;
  // A released block is in use again: not to be named by victim() until it is released.
  virtual void use(i32 id) = 0;
  // That is taken back, in reverse order if there were several, with no other call between: it stands released where it
  // stood, and nothing was learned.
  virtual void undo_use(i32 id) = 0;
  // Nobody uses it any more.
  virtual void release(i32 id) = 0;
  // That is taken back, in reverse order if there were several: it is in use, and a use() before it, if that is taken
  // back too, finds the place from where it took the block.
  virtual void undo_release(i32 id) = 0;
  // The released block that should go next, -1 if there is none. Nothing changes but the policy's own order, and the
  // answer stays the same until another call is made.
  virtual i32 victim() = 0;
  // Counts how often time that went by may have changed the order: that is not taken back.
  virtual i64 aged() const { return 0; }
  // Adds what says in which order blocks go: what stands where. Not what was learned, which a call that is taken back
  // may have added to.
  virtual void digest(Hasher& hash) const = 0;
  // A block that is not in use leaves the cache; mostly the victim, but any may. `key` and `parent` as at insert().
  virtual void evict(i32 id, std::uint64_t key, i32 parent) = 0;
  // That is taken back, in reverse order if there were several: it stands released and next to go, as before.
  virtual void restore(i32 id, std::uint64_t key, i32 parent) = 0;
};

// By name; SpecError, which lists the names there are, when there is none.
std::unique_ptr<EvictionPolicy> make_eviction_policy(const std::string& name);
// Those names, the default first.
std::vector<std::string> eviction_policy_names();

// What make_eviction_policy() chooses from: one function a policy, one file a policy.
std::unique_ptr<EvictionPolicy> make_lru_policy();      // lru.cpp
std::unique_ptr<EvictionPolicy> make_density_policy();  // density.cpp

}  // namespace kvmem
