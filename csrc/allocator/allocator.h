// The allocator's core: sequences over one of the two page tables. Python-free and device-free but for the pool's
// space. Any number of threads may call; the pool's lock serialises them, also across allocators that share the pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "allocator/batch.h"
#include "base/digest.h"
#include "base/fork_guard.h"
#include "base/geometry.h"
#include "index/prefix_index.h"
#include "memory/pages.h"
#include "table/page_table.h"
#include "table/sequences.h"

namespace kvmem {

struct CacheStats {
  i64 limit_bytes = 0;  // the most that the allocator could hold, given what its neighbours in the pool do
  i64 budget_bytes = 0, created_bytes = 0, free_bytes = 0;
  i64 mapped_bytes = 0, used_bytes = 0, parked_bytes = 0, shared_bytes = 0, held_bytes = 0, cached_beside_bytes = 0;
  i64 num_sequences = 0, driver_calls = 0, physical_bytes = 0;
  i64 cached_bytes = 0, cached_blocks = 0, pinned_blocks = 0, evicted_blocks = 0, lookup_tokens = 0, hit_tokens = 0;
};

struct PrefixOptions {
  bool on = true;              // share what sequences have in common
  bool partial = true;         // and copy the equal part of a block that is only partly equal
  std::string policy = "lru";  // what to forget first
  int hash_bits = 64;          // fewer make hashes collide, for tests
  i64 event_capacity = 0;      // events kept until somebody asks for them; 0: none
};

// Why a match is not longer.
enum class MatchEnd : std::uint8_t {
  complete,
  short_block,
  other_salt,
  evicted,
  no_snapshot,
  window,
  never_seen,
  off,
  block_sizes,  // those of the groups have no common multiple of kMostSharedTokens or fewer
};

struct PrefixMatch {
  i64 tokens = 0;
  MatchEnd end = MatchEnd::off;
};

// Entry `column` of the table that `group` has of the call's sequence `row` is `block` now.
struct TableWrite {
  i32 row, column, block, group;
};
using TableWrites = std::vector<TableWrite>;

// One group's part of a batch.
struct GroupBuffers {
  i64 group;
  const BatchBuffers* out;
  BatchMarks* marks;  // what the last fill of the same buffers left there
  BatchSizes sizes;   // what this one has written
};

class Cache final : public TableState {
 public:
  // `owns_pool`: no other allocator uses the pool, so its budget follows set_memory().
  Cache(Geometry geometry, std::shared_ptr<PagePool> pool, bool paged, i64 limit_pages, bool owns_pool,
        const PrefixOptions& prefix);
  ~Cache() override;

  // `group` -1 stands for every group that grows with the sequence's tokens.
  void open(i64 count, i32* handles);
  void extend(const i32* handles, const i32* counts, i64 n, i64 group);
  // True if a sequence that is opened now could be extended by so many tokens. Costs as much, and changes nothing.
  bool can_fit(i64 tokens);
  // `tokens`: the ids, one sequence's after the other's; null if they are not known.
  void commit(const i32* handles, const i32* counts, i64 n, i64 group, const i32* tokens);
  // The same for one sequence, where nothing is to be decided, waited for or given to a driver; else false, and nothing
  // has changed. Short enough to be called under Python's lock. `in_last_block`: only if it takes no other one.
  bool extend_at_hand(i64 handle, i64 count, bool in_last_block = false);
  bool commit_at_hand(i64 handle, i64 count, const i32* tokens = nullptr);
  bool advance_at_hand(i64 handle, i64 count, const i32* tokens, i64 num_tokens, bool in_last_block = false);
  // What they wrote to tables is told, of all groups, and what stands there (cache_requests.cpp).
  TableWrites extend_telling(const i32* handles, const i32* counts, i64 n);
  TableWrites commit_telling(const i32* handles, const i32* counts, i64 n, const i32* tokens);
  TableWrites advance_telling(i64 handle, i64 count, const i32* tokens, i64 num_tokens);
  TableWrites table(i64 handle, i64 group);  // -1: of all groups
  TableWrites tables(const i32* handles, i64 n);
  void truncate(i64 handle, i64 tokens);
  i64 fork(i64 handle);
  void free(const i32* handles, i64 n);

  // --- shared content (cache_prefix.cpp) ---
  // Opens a sequence with as much of `tokens` as is cached, but for one; `*cached` is how much. Short of memory it
  // takes less. OutOfMemory only when all places are taken.
  i64 admit(const i32* tokens, i64 n, const PrefixKey& key, i64* cached);
  // admit() with room for `count` more tokens than are cached, or (-1) for the rest of the prompt; else OutOfMemory,
  // and it was never here.
  i64 begin(const i32* tokens, i64 n, const PrefixKey& key, i64 count, i64* cached);
  // As many of `n` prompts, in their order, as there is memory and places for, each with room for all of its tokens;
  // returns how many. `tokens`: counts[i] of each, one prompt's after the other's.
  i64 admit_batch(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32* handles, i32* cached);
  PrefixMatch match(const i32* tokens, i64 n, const PrefixKey& key);
  // Keeps the whole blocks of the first `tokens` tokens (-1: all that are known) until unpin(); `*pinned` says how many
  // tokens. SpecError unless all of them are known, or cached.
  i64 pin(i64 handle, i64 tokens, i64* pinned);
  i64 pin(const i32* tokens, i64 n, const PrefixKey& key, i64* pinned);
  void unpin(i64 pin);
  void snapshot(i64 handle);
  // Blocks that lie whole in [start, end) of the sequence, present and to come (RetentionPolicy). Of each block the
  // last word counts. Cost: of the blocks that are there from `start` on, and of the ranges that the sequence has.
  void retain(i64 handle, i64 start, i64 end, int priority, double seconds);
  struct Pinned {
    i64 pin, tokens;
  };
  std::vector<Pinned> pins();  // those that keep something, in the order in which they were made
  // Forgets all that nobody uses or pins, and returns how many blocks. In pieces of some thousand, each of them all or
  // nothing, between which others are let in; so an error in the middle keeps what was forgotten before.
  i64 clear_cache();
  // What retain() said of blocks [first, end) of a sequence.
  struct Retention {
    i64 first, end;
    int priority;
    double seconds;
  };
  std::vector<Retention> retained(i64 handle);
  // Events, as EventRing::drain takes them out, and the keys of the roots that they name.
  struct EventBatch {
    i64 number = 0;  // counts the batches that were not empty, from 1
    EventRecords records;
    std::unordered_map<i32, PrefixKey> roots;
  };
  // The batch after number `taken`, the last one that the consumer is done with; without events one of that number. It
  // is given again until the consumer says that it has taken it, so that none is lost on the way: `restart` alone gives
  // up what was not taken. `max` 0: a batch that is given again, no new one.
  std::shared_ptr<EventBatch> drain_events(i64 taken, i64 max, bool restart);

  i64 tokens(i64 handle, i64 group);
  i64 committed(i64 handle, i64 group);
  i64 first_token(i64 handle, i64 group);
  void lengths(const i32* handles, i64 n, i64 group, i64* tokens, i64* committed);
  Placement place(i64 handle, i64 group);
  bool is_live(i64 handle);
  std::vector<i64> handles();  // of the live sequences, by place
  double age_seconds(i64 handle);
  void close();  // no sequence is opened from now on

  // Writes the metadata of these sequences for each of `groups` (no group twice), then padding rows up to `rows`.
  // `new_tokens` null: what is reserved but not committed. SpecError when a buffer is too small; nothing is promised
  // about the contents of the buffers then.
  void fill(const i32* handles, i64 n, const i32* new_tokens, i64 rows, GroupBuffers* groups, i64 num_groups);
  // Of one group, -1: the first one that grows with the tokens.
  BatchSizes fill(const i32* handles, i64 n, const i32* new_tokens, i64 group, i64 rows, const BatchBuffers& out,
                  BatchMarks& marks);
  // Counts the calls that may free, cut or move what a filled batch speaks of. May be read without the lock.
  i64 changes() const { return changes_.load(std::memory_order_relaxed); }
  // The first of a fill's sequences that was freed or cut since, or whose tokens no longer lie where the buffers say;
  // -1 if there is none. Costs a comparison for each sequence, and for each block of those whose table changed.
  i64 find_stale(i64 group, const BatchBuffers& filled, const BatchMarks& marks, BatchSizes* sizes);
  // All of a step: makes room for counts[i] more tokens, commits those that were reserved before it (`tokens`: the
  // `num_tokens` ids of all of them, or null), and fills `groups`. All that could be refused is, before anything is
  // changed, the buffers included.
  void step(const i32* handles, const i32* counts, i64 n, const i32* tokens, i64 num_tokens, i64 rows,
            GroupBuffers* groups, i64 num_groups);
  // The same with buffers of the first group that grows with the tokens alone.
  BatchSizes step(const i32* handles, const i32* counts, i64 n, const i32* tokens, i64 num_tokens, i64 rows,
                  const BatchBuffers& out, BatchMarks& marks);

  // A step of one sequence, without a batch.
  void advance(i64 handle, i64 count, const i32* tokens, i64 num_tokens);

  // out[i]: how many leading whole blocks sequences i and i + 1 have in common, as memory; n - 1 entries. 0 throughout
  // for groups with a window and for states.
  void common_blocks(const i32* handles, i64 n, i64 group, i64* out);
  // A permutation of 0 .. n - 1 that puts sequences with common blocks side by side, nested groups within the outer
  // ones. Groups stand where their first member stood. Cost: as common_blocks() of neighbours in that order, and what
  // is left of n^2 small steps where groups are nested n deep.
  void cascade_order(const i32* handles, i64 n, i64 group, i64* order);

  // Moves blocks together until `bytes` more (-1: all that can be) are free as whole pages; returns how many are.
  i64 compact(i64 bytes);
  // Parked and free pages to the system; -1 for all; returns the bytes given back. In pieces, as clear_cache().
  i64 trim(i64 bytes);
  // How much this allocator may map. With a pool of its own this is the pool's budget too. What is parked goes in
  // pieces as far as it is sure to suffice; the rest is all or nothing.
  void set_memory(i64 pages);
  CacheStats stats();
  std::vector<std::string> check();
  // Of all that a later call could see, of every allocator of the pool (digest.h); and how often that may have changed
  // though no call succeeded: a driver failed when memory had been written, or in the mapper, or a piece of a call that
  // works in pieces was done, or the eviction order has aged. A call that is refused leaves the first unless the second
  // has moved. Both are of one moment: the mapper may fail between two calls. Cost grows with everything.
  std::pair<std::uint64_t, i64> digest();
  bool paged() const { return paged_; }
  void check_process() const { fork_guard_.check("the allocator"); }  // DeviceError in a forked child
  bool shares() const { return prefix_.on; }                          // else it looks at no token
  const Geometry& geometry() const { return geometry_; }
  PagePool& pool() { return *pool_; }
  i64 token_group() const { return token_group_; }  // the first that grows with the tokens
  i64 first_arena(i64 group) const { return table_->first_arena(group); }
  i64 mapped_extent_bytes(i64 group, i64 arena_in_group);

  // For tests: from now on, every block that leaves the cache, once for each group that held it.
  void watch_lost() { enter(), table_->watch_lost(); }
  std::vector<PageTable::Lost> take_lost() {
    const Lock lock = enter(true);
    return table_->take_lost();
  }
  // The other half of the design: what was decided, and deciding nothing but following. A list that is not empty begins
  // with a `version`.
  void record();
  std::vector<Op> take_ops();
  void apply(const std::vector<Op>& ops);

  void apply_table(const Op& op, bool undo) override;

 private:
  // What is known of a sequence's tokens: a chain of published blocks, then its tail. Beyond `known` tokens nothing is.
  struct Content {
    i32 root = kNoNode, leaf = kNoNode;  // the last published block, or the root
    i64 known = 0;
    KeyMarks marks;                   // of all of its tokens, those to come included
    std::vector<Retention> retained;  // ascending, no block twice
    // The fixed state may have seen tokens that are not committed and cannot be any more: they were cut off, or stayed
    // with the sequence that this one was forked from. The next commit() answers for the state again.
    bool state_ahead = false;
  };
  // What a step finds, of all its sequences, in the first group that grows with the tokens.
  struct Planned {
    i64 due = 0;                                 // tokens reserved and not committed
    i64 fresh = 0, blocks = 0, blocks_most = 0;  // new tokens; blocks when there is room for them, and of the longest
    i32 add(const Sequences::Lengths& now, i64 count, i64 block_tokens) {
      const i64 reserved = now.tokens - now.committed, after = ceil_div(now.tokens + count, block_tokens);
      due += reserved, fresh += count, blocks += after;
      blocks_most = std::max(blocks_most, after);
      return static_cast<i32>(reserved);
    }
  };
  using Lock = PoolLock;
  Lock enter(bool look = false);  // look: the books only
  Lock enter_still();             // as enter(), but nothing that a batch speaks of will change
  bool lies_as(i64 index, i64 g, i64 row, const BatchBuffers& filled, const BatchMarks& marks) const;
  void settle();
  void leave();
  i64 pages_at_once() const;
  // Runs `call`, which may change something, with the lock held. A debug build makes sure that the books are right
  // after it, and as they were if it fails.
  template <class Call>
  auto mutate(const Call& call) {
    const Lock lock = enter();
    return geometry_.debug ? watched(call) : call();
  }
  // Runs a piece of a longer call, which stands whatever becomes of the next ones.
  template <class Call>
  void piece(const Call& call) {
    geometry_.debug ? watched(call) : call();
    pool_->note_piece();
  }
  template <class Call>
  [[gnu::noinline]] auto watched(const Call& call) {
    const std::uint64_t before = state_digest();
    const std::size_t logged = pool_->log.size();
    const i64 disturbed = disturbances();
    const auto tried = [&] {
      try {
        return call();
      } catch (...) {
        check_unchanged(before, logged, disturbed);
        throw;
      }
    };
    if constexpr (std::is_void_v<decltype(call())>) {
      tried();
      leave();
    } else {
      auto result = tried();
      leave();
      return result;
    }
  }
  std::uint64_t state_digest() const;
  // The latest sequence came by apply(), so another allocator decides about memory.
  bool follows() const { return followed_to_ == sequences_.opened(); }
  // While it stays the same, a call that fails leaves the digest as it was.
  i64 disturbances() const { return pool_->disturbed() + index_.aged(); }
  void check_unchanged(std::uint64_t before, std::size_t logged, i64 disturbed) const;
  bool is_plain() const {  // one group without a window, and nobody to be told
    return groups_ == 1 && geometry_.groups[0].growth == Growth::token && geometry_.groups[0].window_tokens == 0 &&
           !geometry_.debug && !pool_->recording;
  }
  void free_one(i64 index, Transaction& tx);
  i64 fork_one(i64 parent);
  void count_admitted(i64 n, i64 cached);
  i64 group_begin(i64 group) const { return group < 0 ? 0 : group; }
  i64 group_end(i64 group) const { return group < 0 ? groups_ : group + 1; }
  bool grows(i64 g, i64 group) const { return group >= 0 || geometry_.groups[g].growth == Growth::token; }
  void check_group(i64 group) const {
    if (group < -1 || group >= groups_) refuse_group(group);
  }
  // Groups that grow with the tokens have the same length at all times, and a state has no length.
  void check_own_count(i64 group, const char* verb) const {
    check_group(group);
    if (group >= 0 && geometry_.groups[group].growth != Growth::prefill) refuse_own_count(group, verb);
  }
  [[noreturn]] void refuse_group(i64 group) const;
  [[noreturn]] void refuse_own_count(i64 group, const char* verb) const;
  // Tokens [from, end) that a followed sequence has got, and which of the pages or blocks there others read.
  struct Grown {
    i64 handle, group, from, end;
    std::vector<i64> shared;
  };
  void follow(const std::vector<Op>& ops, FollowedLengths& lengths, FollowRules& rules, Transaction& tx);
  std::vector<Op> spelt_out(const Op& op) const;
  void check_run(const Op& op) const;
  void follow_one(const Op& op, std::vector<Grown>* grown, Transaction& tx);
  void check_mapped(const std::vector<Op>& ops);
  void check_grown(const Grown& grown) const;
  void check_empty(i64 index) const;
  void check_followed(i64 index) const;
  [[noreturn]] void refuse_followed(i64 handle) const;
  void look_at_tails(i64 g);
  // A sequence may stand in a batch once: twice would be decided on a length that is no longer true.
  void check_once(i64 index) {
    if (stamp_[index] == call_) refuse_twice(index);
    stamp_[index] = call_;
  }
  [[noreturn]] void refuse_twice(i64 index) const;
  bool has_room_at_hand(i64 index, i64 count, bool in_last_block);
  bool commit_in_block(i64 index, i64 count, const i32* tokens);
  void advance_one(i64 handle, i64 count, const i32* tokens, i64 num_tokens, TableWrites* telling);
  i32 told_entry(const Placement& at, i64 index, i64 g, i64 ordinal) const;
  void see(i64 row, i64 index, i64 g, i64 first, i64 end);
  void see_committed(i64 row, i64 index, i64 g, i64 count);
  void see_last(i64 row, i64 index, i64 g);
  void see_all(const i32* commits, bool grown);
  void tell_written(bool grown, TableWrites* writes) const;
  std::size_t most_written(const i32* counts) const;
  void add_table(i64 row, i64 index, i64 g, TableWrites* entries) const;
  void plan_extend(const i32* handles, const i32* counts, i64 n, i64 group);
  void plan_simple(const i32* handles, const i32* counts, i64 n);
  [[noreturn]] void refuse_count(i64 handle, i64 count) const;
  bool plan_group(i64 index, i64 g, i64 group, i64 count);
  class Lengthened;
  void grow(const i32* counts, i64 group, std::size_t* at, Transaction& tx);
  void grow_planned(const i32* handles, const i32* counts, i64 n, i64 group);
  void add_lengths(const i32* counts, i64 n, i64 group, i64 sign);
  void log_lengths(const i32* handles, const i32* counts, i64 n, i64 group);
  void grow_one(i64 index, i64 count, i64 group, Transaction& tx);
  [[noreturn]] void explain_planned(std::size_t at, const i32* counts, i64 group, const OutOfMemory& e);
  [[noreturn]] void explain(i64 index, i64 count, i64 group, const std::string& why);
  void map_ahead(i64 n, i64 group);
  void try_map_ahead(i64 n, i64 group);
  bool lacks_trash(i64 g, i64 tokens) const;
  i64 window_front(i64 index, i64 g, i64 committed) const;
  void set_lengths(i64 handle, i64 tokens, i64 committed);
  void set_value(const Op& op, i64 Sequences::Lengths::* which);
  [[noreturn]] void refuse_value(const Op& op, i64 value) const;
  void set_length(i64 index, i64 g, i64 tokens, Transaction& tx);
  void set_committed(i64 index, i64 g, i64 tokens, Transaction& tx);
  void set_front(i64 index, i64 g, i64 token, Transaction& tx);
  void check_due(i64 num_tokens) const;
  Planned plan_rows(i64 n, i64 g, const i32* more, const i32* new_tokens) const;
  void check_fits(const Planned& planned, i64 padding, const BatchBuffers& out) const;
  void check_new_tokens(i64 handle, i64 index, i64 g, i64 fresh) const;
  bool needs_trash(const GroupBuffers* groups, i64 num_groups) const;
  void back_trash(const GroupBuffers* groups, i64 num_groups, Transaction& tx);
  void write_batches(const i32* handles, i64 n, const i32* new_tokens, i64 rows, GroupBuffers* groups,
                     i64 num_groups) const;
  void advance_planned(const i32* handles, const i32* counts, i64 n, const i32* tokens, const GroupBuffers* padded,
                       i64 num_padded);
  [[noreturn]] void refuse_step(i64 handle, i64 g, i64 fresh) const;
  void check_rows(i64 rows, const GroupBuffers& group) const;
  [[noreturn]] void refuse_narrow(const char* field, i64 rows, i64 tokens) const;
  void zero_cuts(i64 n, i64 g);
  BatchSizes write_batch(const i32* handles, i64 n, const i32* new_tokens, i64 g, i64 rows, const BatchBuffers& out,
                         BatchMarks& marks) const;
  bool can_share(i64 g) const;
  void arrange(const std::vector<i64>& places, i64 depth, i64 g, i64** order) const;
  struct Alike {  // sequences with `blocks` blocks in common
    std::vector<i64> places;
    i64 blocks;
  };
  void split(std::vector<i64> places, i64 depth, i64 g, std::vector<Alike>* groups) const;
  void share_group(i64 parent, i64 child, i64 g, Transaction& tx);
  // A block of the content index: a unit of whole blocks of every group (geometry.h).
  i64 block_tokens() const { return index_.block_tokens(); }
  i32* tail(i64 index) { return &tails_[index * tail_tokens_]; }
  // The tag of the block that begins at token `first`, null for none; good until the next call.
  const std::string* tag_at(const KeyMarks& marks, i64 first) const {
    if (marks.empty()) return nullptr;
    tag_ = tag_of_block(marks, first, block_tokens());
    return tag_.empty() ? nullptr : &tag_;
  }
  Found find_cached(i32 root, const i32* tokens, i64 n, const KeyMarks& marks);
  Found find_whole(i64 tokens);
  bool find_part(i32 last, const i32* tokens, i64 count, const std::string* tag, Found* found);
  bool find_end(i64 tokens, Found* found);
  bool windows_reach(i64 tokens) const;
  void look_along_windows();
  // A root in use until this ends; or by keep(), for as many sequences.
  class RootUse {
   public:
    RootUse(PrefixIndex& index, const PrefixKey& key, bool on) : index_(index) {
      if (on) node_ = index.open_root(key, &made_);
    }
    ~RootUse() {
      if (node_ != kNoNode && !kept_) index_.unopen_root(node_, made_);
    }
    RootUse(const RootUse&) = delete;
    RootUse& operator=(const RootUse&) = delete;
    i32 node() const { return node_; }
    void keep(i64 users) {
      if (node_ == kNoNode || users == 0) return;
      kept_ = true;
      for (i64 i = 1; i < users; ++i) index_.enter(node_);
    }

   private:
    PrefixIndex& index_;
    i32 node_ = kNoNode;
    bool made_ = false, kept_ = false;
  };
  // How much of what is cached an admission takes over: the fallbacks of one that is short of memory.
  enum class Reuse : std::uint8_t { all, whole_blocks, none };
  // A sequence opened by the call in progress. entered_[first, end): the nodes it took over, from the start on, then
  // what windows need of them.
  struct Admitted {
    i64 handle = 0, tokens = 0;
    Found found;
    KeyMarks marks;
    std::size_t first = 0, end = 0;
  };
  Admitted admit_one(const i32* tokens, i64 n, const PrefixKey& key, i32 root, Reuse reuse, bool grows,
                     Transaction& tx);
  i64 admit_at(const i32* tokens, i64 n, const PrefixKey& key, Reuse reuse, i64 count, bool grows, i64* cached);
  [[noreturn]] void refuse_room(i64 tokens, i64 most) const;
  i64 admit_some(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32* handles, i32* cached);
  void give_room(const Admitted& one, i64 tokens, Transaction& tx);
  void finish_admission(Admitted& one, const i32* tokens, i32 root);
  void begin_use(Transaction& tx);
  void use(i32 node, i32 window = -1);
  void unuse_from(std::size_t first);
  bool try_adopt(i64 handle, const Found& found, Transaction& tx);
  // Calls f(node, window) of what each window needs of the first `tokens` tokens of a chain.
  template <class F>
  void for_windows(const std::vector<i32>& chain, i64 tokens, F f) const {
    const i64 end = ceil_div(tokens, block_tokens());
    for (i32 w = 0; w < index_.windows(); ++w) {
      for (i64 k = first_needed_block(w, tokens); k < end; ++k) f(chain[k], w);
    }
  }
  i64 first_needed_block(i32 window, i64 tokens) const {
    const GroupGeometry& group = geometry_.groups[index_.group_of(window)];
    return window_first(group, geometry_.tail_guard_tokens, tokens) / block_tokens();
  }
  void need_windows(const std::vector<i32>& chain, i64 tokens);
  void unneed_windows(const std::vector<i32>& chain, i64 tokens);
  MatchEnd why_not_more(const PrefixKey& key, const KeyMarks& marks, i32 root, const i32* tokens, i64 n,
                        i64 found) const;
  void commit_all(const i32* handles, const i32* counts, i64 n, i64 group, const i32* tokens);
  const i32* known_of(const i32* tokens) const { return prefix_.on ? tokens : nullptr; }
  bool completes_any(const i32* counts, i64 n, const i32* known);
  void find_moving(const i32* counts, i64 n, i64 group);
  void write_committed(const i32* counts, i64 n, i64 group, const i32* known, Transaction& tx);
  void finish_commit(const i32* counts, i64 n, i64 group, const i32* known);
  void commit_one(i64 index, i64 count, i64 group, Transaction& tx);
  void start_content(i64 index, i32 root);
  // Whether `count` more tokens complete a block, if all before them are known.
  bool completes(i64 index, i64 count) const {
    return remainder(contents_[index].known, block_tokens()) + count >= block_tokens();
  }
  void collect_published(i64 index, const i32* tokens, i64 count);
  void note_published(i64 index, const i32* tokens, i64 count, std::size_t* at);
  [[gnu::noinline]] void note_blocks(i64 index, const i32* end, std::size_t* at);
  void apply_retention(const Content& content, i32 node);
  static void put_retention(const Retention& added, std::vector<Retention>* retained);
  void collect_chain(i64 index);
  void leave_chain(i64 index);
  void leave_node(i32 node) {
    index_.leave(node);
    if (has_state_ && index_.used(node)) table_->offer(node);
  }
  void collect_leaving(i64 handle, i64 index, i64 tokens);
  void truncate_one(i64 handle, i64 tokens);
  void retract_leaving(i64 index, Transaction& tx);
  void note_truncated(i64 index, i64 have, i64 tokens);
  i64 pin_chain(i64* pinned);
  void tell_resident(i32 node, EventRecords& out) const;
  void check_content(std::vector<std::string>* out) const;

  const i64 number_ = ++made_;  // of this process's caches; never given out twice
  static std::atomic<i64> made_;
  Geometry geometry_;
  std::shared_ptr<PagePool> pool_;
  const bool paged_, owns_pool_;
  const i64 groups_;
  const i64 token_group_;  // the first group that grows with the tokens, or 0
  const PrefixOptions prefix_;
  const MatchEnd off_;     // why nothing is shared, if so
  const bool has_state_;   // some group is of fixed size
  const bool has_window_;  // some group has a sliding window
  const bool is_simple_;   // one group, which only grows; nothing is zeroed when it does
  Sequences sequences_;
  PrefixIndex index_;
  std::unique_ptr<PageTable> table_;
  std::vector<Content> contents_;      // by sequence
  const i64 tail_tokens_;              // a block, or all that a sequence can hold
  std::vector<i32> tails_;             // [sequence][tail_tokens_]: the known tokens after the last published block
  std::unordered_map<i64, i32> pins_;  // pin -> the last node of its chain
  std::shared_ptr<EventBatch> given_;  // by drain_events(), and not taken yet
  i64 batches_seen_ = 0;
  i64 followed_to_ = -1;  // sequences_.opened() after the latest apply()
  i64 pins_seen_ = 0, lookup_tokens_ = 0, hit_tokens_ = 0;
  // Scratch of the call in progress, from here to call_: no later call sees what is left there.
  std::vector<i32> chain_, leaving_;
  std::vector<Item> entered_;  // what the call uses, in the order of use()
  std::vector<Admitted> admitted_;
  std::vector<PartOfBlock> parts_;
  std::vector<i32> runs_;  // [block of chain_][window]: how many on end the window group has, up to and with this one
  mutable std::string tag_;
  std::vector<Published> published_;
  std::vector<i64> indices_;
  std::vector<i64> needy_;   // positions in it: who has no room yet
  std::vector<i64> moving_;  // and whose windows move on
  std::vector<i32> due_;     // what is reserved and not committed, of each
  Planned planned_;          // and of all
  std::vector<i32> ones_;
  TableWrites seen_;        // what the call in progress may replace
  std::vector<i64> stamp_;  // by sequence: the last call that named it
  std::atomic<i64> changes_{0};
  i64 call_ = 0;
  ForkGuard fork_guard_;
};

}  // namespace kvmem
