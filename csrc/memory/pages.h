// The pool of physical pages: which pages exist, which are mapped, how many each owner may map, and who gets the next
// one. It is part of the deciding half: it changes metadata only, and space() executes the decisions on the device.
//
// A page is in one of three states (invariant 1: present = free + mapped, and present <= budget):
//   absent   it was never created, or was destroyed;
//   free     it was created, and no slot maps it;
//   mapped   refs > 0 slots map it; with refs > 1 it is shared. Parked pages are mapped.
//
// Thread safety: one lock serialises all allocators of a pool. Unless a function says otherwise, its caller holds the
// lock. All state changes are ops of a transaction or entries of its journal, so a failed call can be undone.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "base/check.h"
#include "base/digest.h"
#include "base/fork_guard.h"
#include "base/geometry.h"
#include "base/id_set.h"
#include "base/journal.h"
#include "base/ops.h"
#include "base/pool_lock.h"
#include "driver/driver.h"
#include "memory/mapper.h"
#include "memory/space.h"

namespace kvmem {

class Transaction;

// A user of a pool that maps pages: the page table of one allocator. All functions are called under the pool's lock.
class PageOwner {
 public:
  virtual ~PageOwner() = default;
  // Record that an arena of this owner has gained or lost mappings.
  virtual void on_map(const Op& op) = 0;
  virtual void on_unmap(const Op& op) = 0;
  virtual bool is_mapped(i32 arena, i64 slot, i64 count) const = 0;
  // Applies a private op, or with `undo` the inverse of an applied one. finish() ends that transaction.
  virtual void on_content(const Op& op, bool undo) = 0;
  // The pages of these slots belonged to other slots while a call ran that failed and was undone: their content is
  // unknown.
  virtual void on_rewritten(const Op& /*unmap*/) {}
  // A `keep` was undone whose transaction had begun to run: the bytes of its host slot may be overwritten.
  virtual void on_kept_in_vain(const Op& /*keep*/) {}
  // Ops were undone: cancels everything that the transaction had scheduled for its end.
  virtual void on_taken_back() {}
  virtual void finish(bool committed) = 0;
  // Returns whether an undone `evict` can be applied again by itself, because no sequence needs that memory.
  virtual bool can_evict(const Op& evict) const = 0;
  // Returns the number of mapped pages that no live sequence needs.
  virtual i64 parked_pages() const = 0;
  // Returns the number of those that reclaim() is certain to free.
  virtual i64 reclaimable_pages() const = 0;
  // Pushes unmap ops until `pages` pages are free or no page is left that no sequence needs. Returns how many it freed.
  // With `content` it also evicts cached content, once the pages without content do not suffice.
  virtual i64 reclaim(i64 pages, bool content, Transaction& tx) = 0;
  // Pushes ops that move blocks together until `pages` more pages hold nothing, as far as possible. Returns how many
  // do. These pages stay mapped, for reclaim() or for the owner's own use. Returns 0 where a page belongs to one
  // sequence.
  virtual i64 compact(i64 /*pages*/, Transaction& /*tx*/) { return 0; }
  virtual void digest(Hasher& hash) const = 0;

  i64 host_bytes = 0;   // of its host slots; 0: it has none
  i64 owned_pages = 0;  // distinct pages mapped in its arenas
  i64 limit_pages = 0;  // the most that owned_pages may become
  i64 piece_pages = 1;  // how many pages it reclaims in about a millisecond
  i32 number = 0;       // counts the owners of a pool, from 0; private ops carry it
};

class PagePool {
 public:
  // Without a `driver` the pool keeps metadata only, for memory of any size. `create_ahead` creates the whole budget at
  // once, so that no step pays for the creation of a page (28 us on a GPU). Throws SpecError for a page size that the
  // driver cannot map, and what the driver throws.
  PagePool(i64 page_bytes, i64 budget_pages, std::shared_ptr<Driver> driver, bool create_ahead);
  ~PagePool();

  // Waits for the pool's lock and returns it. Throws DeviceError in a forked child, whose copy of the lock may never be
  // released, and in a poisoned pool. If the mapper has failed, its ops are undone first.
  PoolLock lock();
  // Returns the lock, or an empty one where lock() would wait, undo ops of the mapper, or throw DeviceError for a
  // poisoned pool.
  PoolLock try_lock();
  // Like lock(), but also locks a poisoned pool: its allocators must be able to close.
  PoolLock lock_to_close();
  // Throws what lock() would throw. Needs no lock.
  void check_usable() const;
  bool is_poisoned() const { return space_ && space_->is_poisoned(); }
  bool forked() const { return fork_guard_.forked(); }
  // Waits until the mapper is idle, and undoes the ops that it failed to execute.
  void settle();

  i64 page_bytes() const { return page_bytes_; }
  i64 budget_pages() const { return budget_pages_; }
  i64 present_pages() const { return present_pages_; }
  i64 mapped_pages() const { return mapped_pages_; }
  i64 free_pages() const { return present_pages_ - mapped_pages_; }
  i64 room_pages() const { return budget_pages_ - mapped_pages_; }  // free pages, and those that could be created
  i32 refs(i64 page) const { return refs_[page]; }
  bool present(i64 page) const { return page >= 0 && page < known_pages() && refs_[page] >= 0; }
  // Page ids are below this number: the largest budget that the pool has had.
  i64 known_pages() const { return static_cast<i64>(refs_.size()); }
  bool create_ahead() const { return create_ahead_; }
  Space* space() const { return space_.get(); }
  // Whether work may continue after a call has returned, here or where another allocator follows the ops.
  bool has_streams() const { return !space_ || space_->info().has_streams; }
  std::shared_ptr<Space> shared_space() const { return space_; }
  Mapper& mapper() { return *mapper_; }
  i64 fence() const { return fence_; }

  // Registers an owner that is going to add `arenas` arenas. Returns the number of the first: the lowest one from which
  // that many numbers are unused.
  i32 add_owner(PageOwner* owner, i64 arenas);
  // These three remove an owner, in this order, and need no memory. drain() waits until the device no longer uses the
  // owner's memory (invariant 4). drop_page() removes one of its mappings from the metadata. remove_owner() unmaps its
  // arenas, and other owners can use the pages.
  void drain();
  void drop_page(i32 page);
  void remove_owner(PageOwner* owner);
  // REQUIRES: `number` is unused, and the owner is registered.
  void add_arena(PageOwner* owner, i32 number, i64 slots);
  // The arenas of the owner load from and store to these host slots from now on. REQUIRES: `host` outlives them.
  void set_host(PageOwner* owner, char* host, i64 bytes);

  // --- decisions: these push ops to `tx` ---
  // Maps `count` slots of an arena from `slot` on. It prefers pages that follow `near`, so that neighbours in the arena
  // are neighbours in memory, and reclaims pages when none is free. Throws OutOfMemory when nothing is left to reclaim;
  // the caller then drops the transaction.
  void map_slots(PageOwner& owner, i32 arena, i64 slot, i64 count, i64 near, Zero zero, Transaction& tx);
  // Returns how many pages an owner can map without reclaiming any. Fewer are usable where keep_bytes() withholds some.
  i64 ready_pages(const PageOwner& owner) const {
    return std::min(room_pages(), owner.limit_pages - owner.owned_pages);
  }
  i64 most_kept() const { return static_cast<i64>(kept_.size()); }  // how many pages keep_bytes() may withhold
  // Reclaims memory that no sequence needs until ready_pages() is at least `pages`, and returns ready_pages(), which
  // may be less. Other owners lose pages only where this owner's limit is not the obstacle. `content` as in reclaim().
  i64 make_room(PageOwner& owner, i64 pages, bool content, Transaction& tx);
  // Reclaims pages that no sequence needs: pages without content first, then cached content, of `owner` before others.
  // Returns how many it freed, which may be fewer than `pages`.
  i64 reclaim(PageOwner& owner, i64 pages, bool content, Transaction& tx);
  // Destroys up to `pages` free pages, so that the system has the memory. Returns how many.
  i64 give_back(i64 pages, Transaction& tx);

  // Sets the budget, and reclaims pages of every owner where it shrinks. Throws OutOfMemory, and has changed nothing
  // then, where live sequences hold more.
  void set_budget(i64 pages);
  // Do in advance most of what a reduction is going to do: set_budget(pages) for the pool, or for one owner reclaiming
  // until excess() is about 0. They work in pieces, and let others have the lock in between. Others may map what was
  // freed, so the number of pieces is bounded by the excess at the start. They do nothing where the reduction might be
  // refused.
  void shrink_in_pieces(PoolLock& lock, i64 pages);
  void reclaim_in_pieces(PoolLock& lock, PageOwner& owner, const std::function<i64()>& excess);

  // Preserves the content of a mapped page until the transaction ends, even if one slot or none maps it by then. A
  // sequence that has left the page gets it back if the driver fails.
  void keep_bytes(i64 page) {
    KVMEM_ASSERT(present(page) && refs_[page] > 0, "only a mapped page has content to preserve");
    kept_.insert(page);
  }
  bool is_kept(i64 page) const { return !kept_.empty() && kept_.count(page) > 0; }
  // Returns whether a transaction must not write to the page.
  bool is_shared(i64 page) const { return refs_[page] > 1 || is_kept(page); }

  // --- state: called by Transaction only ---
  // Applies a physical op, or with `undo` the inverse of an applied one. Throws SpecError, and has changed nothing
  // then, where it does not follow from the present state. Undoing neither throws nor needs memory.
  void apply(const Op& op, bool undo);
  void apply_private(const Op& op, bool undo) { owner_numbered(op.at).on_content(op, undo); }
  void on_taken_back() {
    release_kept();
    for (PageOwner* owner : owners_) owner->on_taken_back();
  }
  void finish(bool committed) {
    release_kept();
    for (PageOwner* owner : owners_) owner->finish(committed);
  }
  // Called after these ops were undone because the driver failed: marks the content of pages that the driver may have
  // written as unknown. Returns true if it had begun to copy, zero or destroy; what was evicted then stays evicted.
  bool invalidate_content(const std::vector<Op>& ops, const Space::Progress& progress);
  // In a pool without a driver: counts the calls that a GPU's driver would get for these ops.
  void count_calls(const std::vector<Op>& ops);

  // Returns the driver's counters; without a driver, those of count_calls().
  DriverCounters driver_counters() const { return space_ ? space_->driver().counters() : simulated_calls_; }
  i64 driver_calls() const { return driver_counters().total(); }

  // Returns how many pages `owner` could map now, reclaiming included.
  i64 available_pages(const PageOwner& owner) const;
  // Returns how many pages live sequences of the other owners need.
  i64 held_by_others(const PageOwner& owner) const;
  void check(std::vector<std::string>* out) const;
  // Adds the state of the pool and of all its owners to `hash`.
  void digest(Hasher& hash) const;
  // Returns a counter of events after which a failed call may leave another digest than before: a driver failed after
  // it had begun to write, the mapper failed, or a piece of a longer call was committed.
  i64 disturbed() const { return disturbed_; }
  void note_piece() { ++disturbed_; }
  // Between two pieces of a call: lets every thread that waits for the pool have it once.
  void let_others_in(PoolLock& lock) {
    if (lock.give_way()) settle();
  }

  i64 transactions = 0;  // the number of transactions so far
  bool recording = false;
  std::vector<Op> log;      // committed ops, while recording
  std::vector<Op> scratch;  // the ops of the open transaction
  Journal journal;          // what the open transaction has changed beside its ops

 private:
  struct Arena {
    PageOwner* owner = nullptr;
    i64 slots = 0;
  };
  // The content of a page: zeroes, unknown, or (from 0 on) what the owner of this number has written.
  static constexpr i32 kClean = -1;
  static constexpr i32 kUnknown = -2;

  // Searches linearly: a pool has few owners, and mostly it is the first.
  PageOwner& owner_numbered(i32 number) const {
    for (std::size_t i = 0;; ++i) {
      KVMEM_ASSERT(i < owners_.size(), "the owner is registered");
      if (owners_[i]->number == number) return *owners_[i];
    }
  }
  bool is_arena(i32 arena) const {
    return arena >= 0 && arena < static_cast<i32>(arenas_.size()) && arenas_[arena].owner != nullptr;
  }
  void grow_metadata(i64 pages);
  void release_kept();
  i64 find_free(i64 near) const;
  i64 create_absent(i64 most, Transaction& tx);
  void push_zeroes(const PageOwner& owner, i32 arena, i64 slot, i64 page, i64 count, Zero zero, Transaction& tx);
  void forget_content(i64 first, i64 count);
  void apply_create(const Op& op, bool undo);
  void apply_destroy(const Op& op, bool undo);
  void apply_map(const Op& op);
  void apply_unmap(const Op& op, bool undo);
  void check_slots(const char* kind, const Op& op) const;
  void check_bytes(const char* kind, i32 arena, i64 offset, i64 bytes) const;
  template <class More, class Piece>
  void in_pieces(PoolLock& lock, i64 pieces, More more, Piece piece);
  void check_move(const Op& op) const;
  [[noreturn]] void refuse(const PageOwner& owner, i64 asked) const;

  const i64 page_bytes_;
  i64 budget_pages_ = 0;
  i64 present_pages_ = 0;
  i64 mapped_pages_ = 0;
  DriverCounters simulated_calls_;
  i64 disturbed_ = 0;
  i64 fence_ = 0;  // the number of the latest fence
  const bool create_ahead_;
  i64 absent_hint_ = 0;           // no page below it is absent; derived
  std::vector<i32> refs_;         // by page: -1 absent, 0 free, else the number of slots that map it
  IdSet free_;                    // the free pages, without those of kept_; derived
  std::unordered_set<i64> kept_;  // by keep_bytes()
  std::vector<i32> content_;      // by page: kClean, kUnknown, or the number of an owner; the journal has its changes
  std::vector<Arena> arenas_;
  std::vector<PageOwner*> owners_;
  i32 owners_seen_ = 0;
  PoolMutex mutex_;
  ForkGuard fork_guard_;
  std::shared_ptr<Space> space_;
  std::unique_ptr<Mapper> mapper_;  // the last member, so that it stops before the space is destroyed
};

}  // namespace kvmem
