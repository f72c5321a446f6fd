// What every part of a page table works with: the sizes, the pool, the sequences, the content index, and the table's
// arenas. A page table and its metadata are both derived from TableContext.
//
// Arenas are numbered twice. Within a table they count from 0, group by group: group g has the arenas from first_[g] to
// first_[g + 1]. The pool knows them as arena(a); ops contain these numbers.
#pragma once

#include <vector>

#include "base/geometry.h"
#include "index/prefix_index.h"
#include "memory/pages.h"
#include "memory/transaction.h"
#include "table/sequences.h"

namespace kvmem {

// The registration of a page table and of its arenas with the pool; the destructor ends it. REQUIRES of the destructor:
// the table's pages are returned (PagePool::drop_page()).
class ArenaRegistration {
 public:
  ArenaRegistration(PageOwner& owner, const Geometry& geometry, PagePool& pool) : owner_(owner), registrar_(pool) {
    i64 arenas = 0;
    for (const GroupGeometry& group : geometry.groups) arenas += static_cast<i64>(group.arena_slots.size());
    first_number_ = pool.add_owner(&owner, arenas);
    try {
      i32 number = first_number_;
      for (const GroupGeometry& group : geometry.groups) {
        for (const i64 slots : group.arena_slots) pool.add_arena(&owner, number++, slots);
      }
    } catch (...) {
      pool.remove_owner(&owner);
      throw;
    }
  }
  ~ArenaRegistration() { registrar_.remove_owner(&owner_); }
  ArenaRegistration(const ArenaRegistration&) = delete;
  ArenaRegistration& operator=(const ArenaRegistration&) = delete;

 protected:
  i32 first_number() const { return first_number_; }

 private:
  PageOwner& owner_;
  PagePool& registrar_;
  i32 first_number_ = 0;
};

class TableContext {
 public:
  // `base_arena`: the pool's number of the first arena.
  TableContext(const Geometry& geometry, PagePool& pool, const Sequences& sequences, PrefixIndex& index, i32 base_arena)
      : geometry_(geometry),
        pool_(pool),
        sequences_(sequences),
        index_(index),
        groups_(static_cast<i64>(geometry.groups.size())),
        guarded_(geometry.tail_guard_tokens > 0),
        base_arena_(base_arena) {
    for (const GroupGeometry& group : geometry.groups) {
      first_.push_back(arenas_);
      arenas_ += static_cast<i64>(group.token_bytes.size());
      any_state_ = any_state_ || group.growth == Growth::fixed;
    }
    first_.push_back(arenas_);
  }

 protected:
  ~TableContext() = default;

  i64 page_bytes() const { return geometry_.page_bytes; }
  // Conversions of an arena's number: to the pool's, and from it (outside [0, arenas_) for another table's arena).
  i32 arena(i64 a) const { return static_cast<i32>(base_arena_ + a); }
  i64 local_arena(i32 number) const { return number - base_arena_; }
  bool is_own_arena(i32 number) const { return number >= base_arena_ && local_arena(number) < arenas_; }
  i64 group_of(i64 a) const {
    i64 g = 0;
    while (a >= first_[g + 1]) ++g;
    return g;
  }
  i64 token_bytes(i64 g, i64 a) const { return geometry_.groups[g].token_bytes[a - first_[g]]; }
  // settled_tokens() and moved_tokens() as bytes of an arena.
  i64 settled_bytes(i64 g, i64 a, i64 tokens) const {
    return settled_tokens(geometry_.groups[g], tokens) * token_bytes(g, a);
  }
  i64 moved_bytes(i64 g, i64 a, i64 tokens) const {
    return moved_tokens(geometry_.groups[g], tokens) * token_bytes(g, a);
  }
  i64 arena_slots(i64 a) const {
    const i64 g = group_of(a);
    return geometry_.groups[g].arena_slots[a - first_[g]];
  }
  bool has_state(i64 g) const { return geometry_.groups[g].growth == Growth::fixed; }

  // Unmaps what is mapped in slots [from, to), one op for each run of consecutive pages. `page(slot)` returns the page
  // of a slot, -1 for none. `base` is added to each slot, because a row numbers its slots from 0.
  template <class Page>
  void unmap_runs(i64 a, i64 base, i64 from, i64 to, i64 fence, Page page, Transaction& tx) const {
    while (from < to) {
      const i64 first = page(from);
      i64 n = 1;
      if (first >= 0) {
        while (from + n < to && page(from + n) == first + n) ++n;
        tx.push({OpKind::unmap, arena(a), base + from, first, n, fence});
      }
      from += n;
    }
  }

  const Geometry& geometry_;
  PagePool& pool_;
  const Sequences& sequences_;
  PrefixIndex& index_;
  const i64 groups_;
  const bool guarded_;      // kernels load whole tiles: what lies behind a length must be finite
  bool any_state_ = false;  // some group has a fixed state
  i64 arenas_ = 0;
  const i32 base_arena_;
  std::vector<i64> first_;  // first arena of each group, and one past the last
};

}  // namespace kvmem
