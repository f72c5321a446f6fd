// An allocator: sequences over one of the two page tables. This class takes the lock, calls its parts in order and
// reports errors; the header of each part says what the part does.
//
// Thread safety: any number of threads may call. The pool's lock serialises them, also across allocators. Except where
// its comment says otherwise, a function takes that lock, and changes nothing if it fails (invariant 5).
//
// `group` is the index of a group, or -1 for all groups that grow with the tokens. A handle that is not live is refused
// with StaleHandle, any other wrong argument with SpecError.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "allocator/admission.h"
#include "allocator/fill.h"
#include "allocator/follow.h"
#include "allocator/memory.h"
#include "allocator/pins.h"
#include "allocator/table_changes.h"
#include "allocator/tiers.h"
#include "base/fork_guard.h"

namespace kvmem {

class Allocator final : public TableState {
 public:
  // `owns_pool`: no other allocator uses the pool, so set_memory() sets the pool's budget too.
  Allocator(const Geometry& geometry, std::shared_ptr<PagePool> pool, bool paged, i64 limit_pages, bool owns_pool,
            const PrefixOptions& prefix);
  ~Allocator() override;

  // --- sequences ---
  // Opens empty sequences. Throws OutOfMemory if there are fewer places.
  void open(i64 count, i32* handles);
  // Returns whether a sequence opened now could be extended by `tokens`. Changes nothing, but costs as much.
  bool can_fit(i64 tokens);
  // Cuts the sequence to its first `tokens` tokens. Throws SpecError if it has fewer, if a window has dropped what the
  // shorter sequence needs, or if a pin holds what would be cut.
  void truncate(i64 handle, i64 tokens);
  // Returns the handle of a new sequence that shares the committed tokens of this one. Throws OutOfMemory.
  i64 fork(i64 handle);
  void free(i32 handle) { free(&handle, 1); }
  void free(const i32* handles, i64 n);
  // Refuses to open sequences from now on. Returns false if the pool is poisoned: then no sequence can be freed either.
  bool close();

  // --- steps (step.cpp): of one sequence, or of several, each named once ---
  // `changes`, unless null, receives what the call writes to the block tables of all groups. A call for one sequence
  // takes a fast path where nothing has to be decided; others release the embedding language's lock (pool_lock.h).
  //
  // extend() makes room for more tokens; throws OutOfMemory if there is no memory for them.
  void extend(i32 handle, i64 count, i64 group, TableChanges* changes = nullptr);
  void extend(const i32* handles, const i32* counts, i64 n, i64 group, TableChanges* changes = nullptr);
  // commit() declares the KV of reserved tokens valid. `ids`: their token ids, one sequence's after the other's, or
  // null if they are unknown.
  void commit(i32 handle, i64 count, i64 group, const i32* ids, TableChanges* changes = nullptr);
  void commit(const i32* handles, const i32* counts, i64 n, i64 group, const i32* ids, TableChanges* changes = nullptr);
  // step() commits all reserved tokens (`ids`: all `num_ids` of them, or null), then makes room for more tokens.
  void step(i32 handle, i64 count, const i32* ids, i64 num_ids, TableChanges* changes = nullptr);
  // The same for several sequences (counts null: one token each), and fills `groups` with `rows` rows. Checks all
  // arguments and the sizes of the buffers before it changes anything.
  void step(const i32* handles, const i32* counts, i64 n, const i32* ids, i64 num_ids, i64 rows, GroupBuffers* groups,
            i64 num_groups, TableChanges* changes = nullptr);
  // Writes the metadata of these sequences, then padding rows up to `rows`. `new_tokens` null: all tokens that are
  // reserved and not committed. Throws SpecError if a buffer is too small; its content is undefined then.
  void fill(const i32* handles, i64 n, const i32* new_tokens, i64 rows, GroupBuffers* groups, i64 num_groups);
  // Returns the number of calls so far that may have freed, cut or moved what a filled batch names. Takes no lock.
  i64 changes() const { return changes_.load(std::memory_order_relaxed); }
  // Returns the first sequence of a fill that was freed or cut since, or whose tokens have moved; -1 if there is none.
  // Cost: a comparison for each sequence, and for each block of those whose table changed.
  i64 find_stale(i64 group, const BatchBuffers& filled, const BatchMarks& marks, BatchSizes* sizes);

  // --- cached content ---
  // Opens a sequence with the cached prefix of `tokens`, without the last token, and writes its length to `*cached`.
  // Reuses less if memory is short; throws OutOfMemory only if all places are taken.
  i64 admit(const i32* tokens, i64 n, const PrefixKey& key, i64* cached);
  // The same for a pending sequence, which is empty. Returns how many tokens are cached.
  i64 admit_pending(i64 handle, const i32* tokens, i64 n, const PrefixKey& key);
  // As admit(), with room for `count` more tokens than are cached or, with -1, for the whole prompt. Throws OutOfMemory
  // if there is no memory for them.
  i64 begin(const i32* tokens, i64 n, const PrefixKey& key, i64 count, i64* cached);
  // Opens as many of `n` prompts, in order, as there are memory and places for, each with room for all its tokens.
  // Returns how many. `tokens`: counts[i] of each prompt, one prompt's after the other's.
  i64 admit_batch(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32* handles, i32* cached);
  Match match(const i32* tokens, i64 n, const PrefixKey& key);
  Pins::Pinned pin(i64 handle, i64 tokens);
  Pins::Pinned pin(const i32* tokens, i64 n, const PrefixKey& key);
  void unpin(i64 pin);
  std::vector<Pins::Pinned> pins();
  // Stores a copy of the fixed state with the sequence's last block. Throws OutOfMemory.
  void snapshot(i64 handle);
  // Sets a retention priority for the whole blocks in [start, end) of the sequence, present and future. Cost: linear in
  // the sequence's blocks from `start` on and in its ranges.
  void retain(i64 handle, i64 start, i64 end, int priority, double seconds);
  std::vector<Retention> retained(i64 handle);
  // Evicts all unreferenced content and returns the number of blocks. Works in pieces, each of which is all or nothing,
  // and lets other threads in between; what earlier pieces evicted stays evicted if a later one fails.
  i64 clear_cache();
  std::shared_ptr<EventBatch> drain_events(i64 taken, i64 max, bool restart);  // event_batches.h

  // --- queries ---
  Sequences::Lengths lengths(i64 handle, i64 group);
  void lengths(const i32* handles, i64 n, i64 group, i64* tokens, i64* committed);
  Placement place(i64 handle, i64 group);
  // Return all table entries of one sequence, and of several in all groups.
  TableChanges table(i64 handle, i64 group);
  TableChanges tables(const i32* handles, i64 n);
  bool is_live(i64 handle);
  std::vector<i64> handles();  // of the live sequences, by index
  double age_seconds(i64 handle);
  void common_blocks(const i32* handles, i64 n, i64 group, i64* out);    // fill.h
  void cascade_order(const i32* handles, i64 n, i64 group, i64* order);  // fill.h
  // The next four take no lock.
  bool shares() const { return prefix_.on; }  // whether it reads token ids
  const Groups& groups() const { return groups_; }
  PagePool& pool() { return *pool_; }
  i64 first_arena(i64 group) const { return table_->first_arena(group); }
  // Throws DeviceError in a forked child, and if the pool is poisoned.
  void check_usable() const;

  // --- memory (memory.cpp) ---
  // Moves blocks until `bytes` more (-1: as many as possible) are free as whole pages. Returns the bytes freed.
  i64 compact(i64 bytes);
  // Returns parked and free pages to the system, -1 for all of them. Returns the bytes. Works in pieces.
  i64 trim(i64 bytes);
  // Sets how much this allocator may map and, with a pool of its own, the pool's budget. Parked pages are reclaimed in
  // pieces as long as they are sure to suffice; the rest is all or nothing. Throws OutOfMemory if more is in use.
  void set_memory(i64 pages);
  AllocatorStats stats();
  std::vector<std::string> check();
  // Returns a digest of all state of the pool's allocators (digest.h), and the count disturbances(): a refused call
  // leaves the digest as it was unless the count has changed. Cost: linear in all state.
  std::pair<std::uint64_t, i64> digest();
  i64 mapped_extent_bytes(i64 group, i64 arena_in_group);

  // --- tiers (tiers.h) ---
  // Returns what `call` returns of Tiers, under the lock.
  template <class Call>
  auto with_tiers(const Call& call) {
    fork_guard_.check("the allocator");
    const PoolLock lock = pool_->lock();
    return call(tiers_);
  }
  void promote(const i32* tokens, i64 n, const PrefixKey& key, const std::vector<i64>& slots);  // throws OutOfMemory
  void store(const i32* tokens, i64 n, const PrefixKey& key, const std::vector<bool>& wanted);
  // --- recording, and following another allocator; a list of ops that is not empty begins with a `version` ---
  void record();
  std::vector<Op> take_ops();
  void apply(const std::vector<Op>& ops);  // follow.h
  void apply_table(const Op& op, bool undo) override;

 private:
  class InvariantCheck;

  // How a call takes the lock, and how one that changes something runs (update.h).
  PoolLock lock_to_read();
  PoolLock lock_to_fill();
  PoolLock lock_to_change();
  void count_change() { changes_.store(changes() + 1, std::memory_order_relaxed); }  // REQUIRES: the lock
  template <class Call>
  auto update(const Call& call);
  template <class Call>
  void update_piece(const Call& call);
  std::uint64_t state_digest() const;
  std::vector<std::string> violations() const;
  // Counts what changes the digest without a successful call: a driver that failed after memory was written, or in the
  // mapper; a finished piece of a call that works in pieces; aging of the eviction order.
  i64 disturbances() const { return pool_->disturbed() + index_.aged(); }
  std::unique_ptr<PageTable> make_table(bool paged, i64 limit_pages);
  i64 pages_at_once() const;
  void execute(const BatchGroups& padded, TableChanges* changes);
  [[gnu::noinline]] void execute_changes(const BatchGroups& padded, bool publishes);
  template <class FastPath>
  bool try_fast_path(i32 handle, const FastPath& run);
  bool has_room(i64 index, i64 count, bool in_last_block);
  bool commit_in_block(i64 index, i64 count, const i32* ids);
  void share_group(i64 parent, i64 child, i64 g, Transaction& tx);
  void check_cut(i64 handle, i64 index, i64 tokens) const;
  void check_snapshot(i64 handle, i64 index) const;
  i64 admit_one(const i32* tokens, i64 n, const PrefixKey& key, Reuse reuse, i64 count, bool grows, i64* cached);
  i64 admit_first(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32* handles, i32* cached);

  const Groups groups_;
  const std::shared_ptr<PagePool> pool_;
  const bool owns_pool_;
  const PrefixOptions prefix_;
  Sequences sequences_;
  PrefixIndex index_;
  std::unique_ptr<PageTable> table_;
  Planner planner_;
  SequenceRecords records_;
  SequenceGrowth growth_;
  PrefixMatcher matcher_;
  SequenceContents contents_;
  Admission admission_;
  Pins pins_;
  Follower follower_;
  TableDiff table_diff_;
  BatchFiller filler_;
  EventBatches events_;
  Tiers tiers_;
  StepPlan plan_;  // of the call in progress; a member so that its memory is reused
  std::atomic<i64> changes_{0};
  ForkGuard fork_guard_;
};

}  // namespace kvmem
