// The pool of physical pages: who may have how many, and which. The deciding half only; pool.space() acts.
//
// Invariant 1: present = free + mapped (parked pages are mapped ones), and present <= budget. A page is
//   absent   never created, or given back to the system;
//   free     created, mapped nowhere;
//   mapped   refs > 0 slots show it. refs > 1 is sharing.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

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

// Whoever maps pages of a pool: the page table of one allocator.
class PageOwner {
 public:
  virtual ~PageOwner() = default;
  // The state changes that one of its arenas has gained or lost mappings.
  virtual void on_map(const Op& op) = 0;
  virtual void on_unmap(const Op& op) = 0;
  virtual bool is_mapped(i32 arena, i64 slot, i64 count) const = 0;
  // The state changes that its content index has gained or lost a place; and then the end of that transaction.
  virtual void on_content(const Op& op, bool undo) = 0;
  // The pages behind these slots were another's until a call that failed was undone, and hold anything now.
  virtual void on_rewritten(const Op& /*unmap*/) {}
  // Records were taken back: nothing that the transaction was going to do when it ends is to be done any more.
  virtual void on_taken_back() {}
  virtual void finish(bool committed) = 0;
  // True if an `evict` that was taken back can be done again by itself: nobody alive needs that memory.
  virtual bool can_evict(const Op& evict) const = 0;
  // Mapped pages that no live sequence needs.
  virtual i64 parked_pages() const = 0;
  // Those of them that reclaim() frees for certain.
  virtual i64 reclaimable_pages() const = 0;
  // Pushes unmap records until `pages` pages are free, as far as there are any that nobody needs; returns how many it
  // freed. `content`: cached content is evicted too, where pages that hold none do not suffice.
  virtual i64 reclaim(i64 pages, bool content, Transaction& tx) = 0;
  // Pushes the records that move blocks together until `pages` more pages hold nothing, as far as that can be; returns
  // how many do. They stay mapped, for reclaim() or the owner's own use. 0 where pages belong to one sequence each.
  virtual i64 compact(i64 pages, Transaction& tx);
  virtual void digest(Hasher& hash) const = 0;

  i64 owned_pages = 0;  // distinct pages mapped in its arenas
  i64 limit_pages = 0;  // and how many that may be
  i64 piece_pages = 1;  // how many it gives up in about a millisecond
  i32 number = 0;       // counts the owners of a pool, from 0; private records carry it
};

class PagePool {
 public:
  // `driver` null: bookkeeping only, memory of any size. `create_ahead`: create the whole budget at once, so that no
  // driver call for a page is left for later (28 us each on a GPU).
  PagePool(i64 page_bytes, i64 budget_pages, std::shared_ptr<Driver> driver, bool create_ahead);
  ~PagePool();

  // Serialises every allocator of this pool. DeviceError in a forked child, whose copy of the lock may never open, and
  // where the pool cannot be trusted: a driver's call failed, and taking back what it had done failed too.
  PoolLock lock();
  // The same without waiting: owns nothing where lock() would wait, settle or refuse.
  PoolLock try_lock();
  PoolLock lock_to_close();   // also of a pool that cannot be trusted: its allocators can be closed
  void check_usable() const;  // the refusals of lock() alone
  bool is_poisoned() const { return space_ && space_->is_poisoned(); }
  bool forked() const { return fork_guard_.forked(); }
  // The mapper is idle and what it failed to do is taken back. The caller holds the lock.
  void settle();

  i64 page_bytes() const { return page_bytes_; }
  i64 budget_pages() const { return budget_pages_; }
  i64 present_pages() const { return present_pages_; }
  i64 mapped_pages() const { return mapped_pages_; }
  i64 free_pages() const { return present_pages_ - mapped_pages_; }
  i64 room_pages() const { return budget_pages_ - mapped_pages_; }  // free, or could be created
  i32 refs(i64 page) const { return refs_[page]; }
  bool present(i64 page) const { return page >= 0 && page < static_cast<i64>(refs_.size()) && refs_[page] >= 0; }
  // Page ids are below it: the largest budget there ever was.
  i64 known_pages() const { return static_cast<i64>(refs_.size()); }
  bool create_ahead() const { return create_ahead_; }
  Space* space() const { return space_.get(); }
  std::shared_ptr<Space> shared_space() const { return space_; }
  Mapper& mapper() { return *mapper_; }
  i64 fence() const { return fence_; }

  // `arenas`: how many it is going to add. Returns the number of the first: one that was given back, where there is.
  i32 add_owner(PageOwner* owner, i64 arenas);
  // The end of an owner, in this order and without any memory: waits for whoever uses its memory still (invariant 4);
  // each of its mappings goes; its arenas are unmapped, and the pages are free for the others.
  void drain();
  void drop_page(i32 page);
  void remove_owner(PageOwner* owner);
  void add_arena(PageOwner* owner, i32 number, i64 slots);

  // --- decisions: push records to `tx` ---
  // Maps `count` slots of an arena from `slot` on, taking pages that follow `near` where they are free, so that
  // neighbours in the arena are neighbours in memory. Spills parked pages when none is free. OutOfMemory when there is
  // nothing left; the transaction is then the caller's to drop.
  void map_slots(PageOwner& owner, i32 arena, i64 slot, i64 count, i64 near, Zero zero, Transaction& tx);
  // How many pages an owner can get with nothing given up; fewer where the bytes of some are kept.
  i64 ready_pages(const PageOwner& owner) const {
    return std::min(room_pages(), owner.limit_pages - owner.owned_pages);
  }
  i64 most_kept() const { return static_cast<i64>(kept_.size()); }  // by keep_bytes()
  // Gives up what nobody needs until so many are at hand, of others only where it is not the owner's own limit that is
  // in the way; returns how many are. `content` as for reclaim().
  i64 make_room(PageOwner& owner, i64 pages, bool content, Transaction& tx);
  // Takes pages from what nobody needs, of `owner` first: those without content of everybody, then cached content.
  // Returns how many it freed, which may be fewer than `pages`.
  i64 reclaim(PageOwner& owner, i64 pages, bool content, Transaction& tx);
  i64 give_back(i64 pages, Transaction& tx);  // free pages to the system

  // Grows or shrinks the budget, spilling parked pages of every owner. OutOfMemory, and nothing changed, when live
  // sequences hold more. The caller holds the lock.
  void set_budget(i64 pages);
  // As much of what set_budget(pages), fewer than now, is going to do as is sure to suffice, in pieces between which
  // others get the lock. They may take what is given up: so there are no more pieces than there was to give up.
  void shrink_in_pieces(PoolLock& lock, i64 pages);
  // The same of one owner, until `excess()` is about 0.
  void reclaim_in_pieces(PoolLock& lock, PageOwner& owner, const std::function<i64()>& excess);

  // A live sequence of before the transaction leaves the page: should the driver fail, it is there again. So nobody
  // writes to the page before the transaction ends, even if only one slot shows it, or none.
  void keep_bytes(i64 page) { kept_.insert(page); }
  bool is_kept(i64 page) const { return !kept_.empty() && kept_.count(page) > 0; }
  // Whether a transaction must leave alone what a slot shows.
  bool is_shared(i64 page) const { return refs_[page] > 1 || is_kept(page); }

  // --- state: called by Transaction only ---
  void apply(const Op& op, bool undo);
  void apply_private(const Op& op, bool undo) { owner_numbered(op.at).on_content(op, undo); }
  void on_taken_back() {
    let_go();
    for (PageOwner* owner : owners_) owner->on_taken_back();
  }
  void finish(bool committed) {
    let_go();
    for (PageOwner* owner : owners_) owner->finish(committed);
  }

  // These records were taken back after a driver had begun to execute them: what pages held that it may have touched is
  // not known any more. If it has begun to copy or zero, or to destroy pages, what was to be given up stays given up:
  // true then.
  bool distrust(const std::vector<Op>& ops, const Space::Progress& progress);

  // Without a driver, what a GPU's would have been asked: a map for each page, a set_access or an unmap for each run.
  void count_calls(const std::vector<Op>& ops);
  // Without a space: as a GPU's driver would have been called for mappings; its pages are created at the start.
  DriverCounters driver_counters() const { return space_ ? space_->driver().counters() : counted_; }
  i64 driver_calls() const { return driver_counters().total(); }

  // Pages that could be had for `owner` right now, spilling included.
  i64 available_pages(const PageOwner& owner) const;
  // Pages that live sequences of the other owners need.
  i64 held_by_others(const PageOwner& owner) const;
  void check(std::vector<std::string>* out) const;
  // Of the pool and all its owners.
  void digest(Hasher& hash) const;
  // How often a driver failed after it had begun to write, or behind the caller's back, or a piece of a longer call was
  // done: only then may an error leave another digest, since what was cached may have been written over, or what was
  // mapped ahead is not there, or the piece stands.
  i64 disturbed() const { return disturbed_; }
  void note_piece() { ++disturbed_; }
  // Between two pieces of a call: everybody who waits for the pool gets it once.
  void let_others_in(PoolLock& lock) {
    if (lock.give_way()) settle();
  }

  i64 transactions = 0;  // counts them
  bool recording = false;
  std::vector<Op> log;      // committed records, while recording
  std::vector<Op> scratch;  // the buffer of the one open transaction
  Journal journal;          // and what it has changed beside its records

 private:
  struct Arena {
    PageOwner* owner = nullptr;
    i64 slots = 0;
  };
  // What a page holds: zeroes, garbage, or what owner number n left there.
  static constexpr i32 kClean = -1;
  static constexpr i32 kGarbage = -2;

  // A page table that is there. Mostly the first: a pool has few.
  PageOwner& owner_numbered(i32 number) const {
    std::size_t i = 0;
    while (owners_[i]->number != number) ++i;
    return *owners_[i];
  }
  void grow_books(i64 pages);
  void let_go();
  i64 find_free(i64 near) const;
  void need_zero(const PageOwner& owner, i32 arena, i64 slot, i64 page, i64 count, Zero zero, Transaction& tx);
  void forget_content(i64 first, i64 count);
  void set_mapped(const Op& op);
  void set_unmapped(const Op& op);
  void check_slots(const char* kind, const Op& op) const;
  void check_bytes(const char* kind, i32 arena, i64 offset, i64 bytes) const;
  [[noreturn]] void refuse_tier(const Op& op) const;  // load and store: nothing executes them yet
  [[noreturn]] void refuse(const PageOwner& owner, i64 asked) const;

  const i64 page_bytes_;
  i64 budget_pages_ = 0;
  i64 present_pages_ = 0;
  i64 mapped_pages_ = 0;
  DriverCounters counted_;
  i64 disturbed_ = 0;
  i64 fence_ = 0;
  const bool create_ahead_;
  i64 absent_hint_ = 0;           // no page below it is absent; derived
  std::vector<i32> refs_;         // -1 absent, 0 free, else the number of mappings; changed by records
  IdSet free_;                    // those with 0 but the kept ones; derived
  std::unordered_set<i64> kept_;  // by keep_bytes()
  std::vector<i32> content_;      // kClean, kGarbage, or the number of the owner that wrote it; noted in the journal
  std::vector<Arena> arenas_;
  std::vector<PageOwner*> owners_;
  i32 owners_seen_ = 0;
  PoolMutex mutex_;
  ForkGuard fork_guard_;
  std::shared_ptr<Space> space_;
  std::unique_ptr<Mapper> mapper_;  // last: it stops before the space goes
};

}  // namespace kvmem
