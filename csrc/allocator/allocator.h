// An allocator: sequences over one of the two page tables. This class locks, puts the calls of its parts in order and
// reports errors; each part's header says what it does. Any number of threads may call: the pool's lock serialises
// them, also across allocators that share the pool. A call that fails changes nothing (invariant 5) unless it says so.
//
// The argument `group` is an index, or -1 for every group that grows with the tokens.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "allocator/admission.h"
#include "allocator/event_batches.h"
#include "allocator/fill.h"
#include "allocator/follow.h"
#include "allocator/pins.h"
#include "allocator/table_changes.h"
#include "base/fork_guard.h"

namespace kvmem {

struct AllocatorStats {
  i64 limit_bytes = 0;  // the most that the allocator could hold, given what its neighbours in the pool do
  i64 budget_bytes = 0, created_bytes = 0, free_bytes = 0;
  i64 mapped_bytes = 0, used_bytes = 0, parked_bytes = 0, shared_bytes = 0, held_bytes = 0, cached_beside_bytes = 0;
  i64 num_sequences = 0, driver_calls = 0, physical_bytes = 0;
  i64 cached_bytes = 0, cached_blocks = 0, pinned_blocks = 0, evicted_blocks = 0, lookup_tokens = 0, hit_tokens = 0;
};

class Allocator final : public TableState {
 public:
  // `owns_pool`: no other allocator uses the pool, so its budget follows set_memory().
  Allocator(const Geometry& geometry, std::shared_ptr<PagePool> pool, bool paged, i64 limit_pages, bool owns_pool,
            const PrefixOptions& prefix);
  ~Allocator() override;

  // --- sequences ---
  void open(i64 count, i32* handles);
  // True if a sequence that is opened now could be extended by so many tokens. Costs as much, and changes nothing.
  bool can_fit(i64 tokens);
  void truncate(i64 handle, i64 tokens);
  i64 fork(i64 handle);
  void free(i32 handle) { free(&handle, 1); }
  void free(const i32* handles, i64 n);
  bool close();  // no sequence is opened from now on. False where the pool is poisoned: then none can be freed either

  // --- steps (step.cpp): of one sequence, or of many, each once ---
  // What is written to block tables, of all groups, comes into `changes`; null where nobody asks. A call for one
  // sequence for which nothing has to be decided is short; any other lets an embedding language's lock go
  // (pool_lock.h).
  void extend(i32 handle, i64 count, i64 group, TableChanges* changes = nullptr);
  void extend(const i32* handles, const i32* counts, i64 n, i64 group, TableChanges* changes = nullptr);
  // `ids`: of the tokens, one sequence's after the other's; null if they are not known.
  void commit(i32 handle, i64 count, i64 group, const i32* ids, TableChanges* changes = nullptr);
  void commit(const i32* handles, const i32* counts, i64 n, i64 group, const i32* ids, TableChanges* changes = nullptr);
  // Commits all that is reserved (`ids`: all of the `num_ids` of it, or null), and makes room for `count` more tokens.
  void step(i32 handle, i64 count, const i32* ids, i64 num_ids, TableChanges* changes = nullptr);
  // The same for counts[i] (null: 1) more tokens, and fills `groups` with `rows` rows. All that could be refused is,
  // before anything is changed, the buffers included.
  void step(const i32* handles, const i32* counts, i64 n, const i32* ids, i64 num_ids, i64 rows, GroupBuffers* groups,
            i64 num_groups, TableChanges* changes = nullptr);
  // Writes the metadata of these sequences, then padding rows up to `rows`. `new_tokens` null: what is reserved but not
  // committed. SpecError when a buffer is too small; what the buffers hold then is not known.
  void fill(const i32* handles, i64 n, const i32* new_tokens, i64 rows, GroupBuffers* groups, i64 num_groups);
  // Counts the calls that may free, cut or move what a filled batch speaks of. May be read without the lock.
  i64 changes() const { return changes_.load(std::memory_order_relaxed); }
  // The first of a fill's sequences that was freed or cut since, or whose tokens no longer lie where the buffers say;
  // -1 if there is none. Costs a comparison for each sequence, and for each block of those whose table changed.
  i64 find_stale(i64 group, const BatchBuffers& filled, const BatchMarks& marks, BatchSizes* sizes);

  // --- cached content ---
  // Opens a sequence with as much of `tokens`, without the last one, as is cached; `*cached` is how much. Short of
  // memory it takes less. OutOfMemory only when all places are taken.
  i64 admit(const i32* tokens, i64 n, const PrefixKey& key, i64* cached);
  // admit() with room for `count` more tokens than are cached, or (-1) for the rest of the prompt; else OutOfMemory,
  // and it was never here.
  i64 begin(const i32* tokens, i64 n, const PrefixKey& key, i64 count, i64* cached);
  // As many of `n` prompts, in their order, as there is memory and places for, each with room for all of its tokens;
  // returns how many. `tokens`: counts[i] of each, one prompt's after the other's.
  i64 admit_batch(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32* handles, i32* cached);
  Match match(const i32* tokens, i64 n, const PrefixKey& key);
  Pins::Pinned pin(i64 handle, i64 tokens);
  Pins::Pinned pin(const i32* tokens, i64 n, const PrefixKey& key);
  void unpin(i64 pin);
  std::vector<Pins::Pinned> pins();
  // Keeps a copy of the fixed state with the last block of the sequence's tokens.
  void snapshot(i64 handle);
  // Blocks that lie whole in [start, end) of the sequence, present and to come. Cost: of the blocks that are there from
  // `start` on, and of the ranges that the sequence has.
  void retain(i64 handle, i64 start, i64 end, int priority, double seconds);
  std::vector<Retention> retained(i64 handle);
  // Evicts all that nobody uses or pins, and returns how many blocks. In pieces of some thousand, each of them all or
  // nothing, between which others are let in; so an error in the middle leaves evicted what was so before.
  i64 clear_cache();
  std::shared_ptr<EventBatch> drain_events(i64 taken, i64 max, bool restart);  // event_batches.h

  // --- what is there ---
  i64 tokens(i64 handle, i64 group);
  i64 committed(i64 handle, i64 group);
  i64 first_token(i64 handle, i64 group);
  void lengths(const i32* handles, i64 n, i64 group, i64* tokens, i64* committed);
  Placement place(i64 handle, i64 group);
  TableChanges table(i64 handle, i64 group);  // all entries; -1: of all groups
  TableChanges tables(const i32* handles, i64 n);
  bool is_live(i64 handle);
  std::vector<i64> handles();  // of the live sequences, by index
  double age_seconds(i64 handle);
  void common_blocks(const i32* handles, i64 n, i64 group, i64* out);    // cascade.h
  void cascade_order(const i32* handles, i64 n, i64 group, i64* order);  // cascade.h
  bool shares() const { return prefix_.on; }                             // else it looks at no token
  const Groups& groups() const { return groups_; }
  PagePool& pool() { return *pool_; }
  i64 first_arena(i64 group) const { return table_->first_arena(group); }
  void check_usable() const {  // DeviceError in a forked child, and where the pool is poisoned
    fork_guard_.check("the allocator");
    pool_->check_usable();
  }

  // --- memory (memory.cpp) ---
  i64 compact(i64 bytes);  // until so many more (-1: all that can be) are free as whole pages; returns how many are
  i64 trim(i64 bytes);     // parked and free pages to the system; -1 for all; returns the bytes. In pieces
  // How much this allocator may map. With a pool of its own this is the pool's budget too. What is parked goes in
  // pieces as far as it is sure to suffice; the rest is all or nothing.
  void set_memory(i64 pages);
  AllocatorStats stats();
  std::vector<std::string> check();
  // Of all that a later call could see, of every allocator of the pool (digest.h); and how often that may have changed
  // though no call succeeded: a driver failed when memory had been written, or in the mapper, or a piece of a call that
  // works in pieces was done, or the eviction order has aged. A call that is refused leaves the first unless the second
  // has moved. Both are of one moment: the mapper may fail between two calls. Cost grows with everything.
  std::pair<std::uint64_t, i64> digest();
  i64 mapped_extent_bytes(i64 group, i64 arena_in_group);

  // For tests: from now on, every block that leaves the cache, once for each group that held it.
  void watch_lost();
  std::vector<PageTable::Lost> take_lost();

  // --- deciding here, acting elsewhere. A list of ops that is not empty begins with a `version` ---
  void record();
  std::vector<Op> take_ops();
  void apply(const std::vector<Op>& ops);  // follow.h

  void apply_table(const Op& op, bool undo) override;

 private:
  class Watch;
  PoolLock enter(bool look = false);  // look: nothing is changed
  PoolLock enter_still();             // as enter(), but nothing that a batch speaks of will change
  void settle() { pool_->settle(); }
  // Runs `call`, which may change something, with the lock held. A debug build makes sure that the metadata is right
  // after it, and as it was if it fails.
  template <class Call>
  auto mutate(const Call& call);
  // Runs a piece of a longer call, which stands whatever becomes of the next ones.
  template <class Call>
  void piece(const Call& call);
  std::uint64_t state_digest() const;
  std::vector<std::string> violations() const;
  // While it stays the same, a call that fails leaves the digest as it was.
  i64 disturbances() const { return pool_->disturbed() + index_.aged(); }
  std::unique_ptr<PageTable> make_table(bool paged, i64 limit_pages);
  i64 pages_at_once() const;
  void carry_out(const BatchGroups& padded, TableChanges* changes);
  [[gnu::noinline]] void change(const BatchGroups& padded, bool publishes);
  template <class Short>
  bool try_short(i32 handle, const Short& run);
  bool has_room(i64 index, i64 count, bool in_last_block);
  bool commit_in_block(i64 index, i64 count, const i32* ids);
  void share_group(i64 parent, i64 child, i64 g, Transaction& tx);
  void check_cut(i64 handle, i64 index, i64 tokens) const;
  void check_snapshot(i64 handle, i64 index) const;
  i64 admit_one(const i32* tokens, i64 n, const PrefixKey& key, Reuse reuse, i64 count, bool grows, i64* cached);
  i64 admit_some(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32* handles, i32* cached);

  const Groups groups_;
  const std::shared_ptr<PagePool> pool_;
  const bool owns_pool_;
  const PrefixOptions prefix_;
  Sequences sequences_;
  PrefixIndex index_;
  std::unique_ptr<PageTable> table_;
  Planner planner_;
  SequenceRecords records_;
  Room room_;
  PrefixMatcher matcher_;
  SequenceContents contents_;
  Admission admission_;
  Pins pins_;
  Follower follower_;
  TableDiff table_diff_;
  BatchFiller filler_;
  EventBatches events_;
  StepPlan plan_;  // of the call in progress; kept for its memory
  std::atomic<i64> changes_{0};
  ForkGuard fork_guard_;
};

}  // namespace kvmem
