// The allocator's core: sequences over one of the two page tables. Python-free and device-free but for the pool's
// space. Any number of threads may call; the pool's lock serialises them, also across allocators that share the pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "batch.h"
#include "digest.h"
#include "fork_guard.h"
#include "geometry.h"
#include "page_table.h"
#include "pages.h"
#include "prefix.h"
#include "sequences.h"

namespace kvmem {

struct CacheStats {
  i64 budget_bytes = 0, created_bytes = 0, free_bytes = 0;
  i64 mapped_bytes = 0, used_bytes = 0, parked_bytes = 0, shared_bytes = 0;
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
enum class MatchEnd : std::uint8_t { complete, short_block, other_salt, evicted, no_snapshot, window, never_seen, off };

struct PrefixMatch {
  i64 tokens = 0;
  MatchEnd end = MatchEnd::off;
};

// Entry `column` of the table of the call's sequence `row` is `block` now.
struct TableWrite {
  i32 row, column, block;
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
  // `tokens`: the ids, one sequence's after the other's; null if they are not known.
  void commit(const i32* handles, const i32* counts, i64 n, i64 group, const i32* tokens);
  // The same for one sequence, where nothing is to be decided, waited for or given to a driver; else false, and nothing
  // has changed. Short enough to be called under Python's lock. `in_last_block`: only if it takes no other one.
  bool extend_at_hand(i64 handle, i64 count, bool in_last_block = false);
  bool commit_at_hand(i64 handle, i64 count, const i32* tokens = nullptr);
  bool advance_at_hand(i64 handle, i64 count, const i32* tokens, i64 num_tokens, bool in_last_block = false);
  // What they wrote to tables is told, and what stands there (cache_requests.cpp).
  TableWrites extend_telling(const i32* handles, const i32* counts, i64 n);
  TableWrites commit_telling(const i32* handles, const i32* counts, i64 n, const i32* tokens);
  TableWrites advance_telling(i64 handle, i64 count, const i32* tokens, i64 num_tokens);
  TableWrites table(i64 handle, i64 group);
  void truncate(i64 handle, i64 tokens);
  i64 fork(i64 handle);
  void free(const i32* handles, i64 n);

  // --- shared content (cache_prefix.cpp) ---
  // Opens a sequence with as much of `tokens` as is cached, but for one; `*cached` is how much. Short of memory it
  // takes less. OutOfMemory only when all places are taken.
  i64 admit(const i32* tokens, i64 n, const PrefixKey& key, i64* cached);
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
  // Blocks that lie whole in [start, end) of the sequence, present and to come (RetentionPolicy).
  void retain(i64 handle, i64 start, i64 end, int priority, double seconds);
  i64 clear_cache();  // forgets all that nobody uses or pins; how many blocks
  // Takes out events (EventRing::drain), and the keys of the roots that they name.
  EventRecords drain_events(i64 max, bool restart, std::unordered_map<i32, PrefixKey>* roots);

  i64 tokens(i64 handle, i64 group);
  i64 committed(i64 handle, i64 group);
  i64 first_token(i64 handle, i64 group);
  void lengths(const i32* handles, i64 n, i64 group, i64* tokens, i64* committed);
  Placement place(i64 handle, i64 group);
  std::vector<i64> handles();  // of the live sequences, by place

  // Writes the metadata of these sequences for each of `groups` (no group twice), then padding rows up to `rows`.
  // `new_tokens` null: what is reserved but not committed. SpecError when a buffer is too small; nothing is promised
  // about the contents of the buffers then.
  void fill(const i32* handles, i64 n, const i32* new_tokens, i64 rows, GroupBuffers* groups, i64 num_groups);
  // Of one group, -1: the first one that grows with the tokens.
  BatchSizes fill(const i32* handles, i64 n, const i32* new_tokens, i64 group, i64 rows, const BatchBuffers& out,
                  BatchMarks& marks);
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
  i64 trim(i64 bytes);  // parked and free pages to the system; -1 for all; returns the bytes given back
  // How much this allocator may map. With a pool of its own this is the pool's budget too.
  void set_memory(i64 pages);
  CacheStats stats();
  std::vector<std::string> check();
  // Of all that a later call could see, of every allocator of the pool (digest.h). A call that is refused leaves it,
  // unless disturbed() has changed: a driver failed when memory had been written. Cost grows with everything.
  std::uint64_t digest();
  i64 disturbed();
  bool paged() const { return paged_; }
  bool shares() const { return prefix_.on; }  // else it looks at no token
  const Geometry& geometry() const { return geometry_; }
  PagePool& pool() { return *pool_; }
  i64 token_group() const { return token_group_; }  // the first that grows with the tokens
  i64 first_arena(i64 group) const { return table_->first_arena(group); }
  i64 mapped_extent_bytes(i64 group, i64 arena_in_group);

  // The other half of the design: what was decided, and deciding nothing but following.
  void record();
  std::vector<Op> take_ops();
  void apply(const std::vector<Op>& ops);

  void apply_table(const Op& op, bool undo) override;

 private:
  // What is known of a sequence's tokens: a chain of published blocks, then its tail. Beyond `known` tokens nothing is.
  struct Retention {
    i64 start, end;
    int priority;
    double seconds;
  };
  struct Content {
    i32 root = kNoNode, leaf = kNoNode;  // the last published block, or the root
    i64 known = 0;
    std::vector<Retention> retained;
    bool state_ahead = false;  // a truncation took tokens back that the fixed state has seen
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
  using Lock = std::unique_lock<std::mutex>;
  Lock enter(bool look = false);  // look: the books only
  void settle();
  void leave();
  // Runs `call`, which may change something, with the lock held. A debug build makes sure that the books are right
  // after it, and as they were if it fails.
  template <class Call>
  auto mutate(const Call& call) {
    const Lock lock = enter();
    return geometry_.debug ? watched(call) : call();
  }
  template <class Call>
  [[gnu::noinline]] auto watched(const Call& call) {
    const std::uint64_t before = state_digest();
    const i64 disturbed = pool_->disturbed();
    const auto tried = [&] {
      try {
        return call();
      } catch (...) {
        check_unchanged(before, disturbed);
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
  void check_unchanged(std::uint64_t before, i64 disturbed) const;
  bool is_plain() const {  // one group without a window, and nobody to be told
    return groups_ == 1 && geometry_.groups[0].growth == Growth::token && geometry_.groups[0].window_tokens == 0 &&
           !geometry_.debug && !pool_->recording;
  }
  void free_one(i64 index, Transaction& tx);
  i64 fork_one(i64 parent);
  i64 group_begin(i64 group) const { return group < 0 ? 0 : group; }
  i64 group_end(i64 group) const { return group < 0 ? groups_ : group + 1; }
  bool grows(i64 g, i64 group) const { return group >= 0 || geometry_.groups[g].growth == Growth::token; }
  void check_group(i64 group) const;
  void check_own_count(i64 group, const char* verb) const;
  void follow(const std::vector<Op>& ops, Transaction& tx);
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
  void see(i64 row, i64 index, i64 ordinal);
  void see_last(i64 row, i64 index);
  void see_completed(i64 row, i64 index, i64 count);
  void tell_written(bool grown, TableWrites* writes) const;
  std::size_t most_written(const i32* counts) const;
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
  i64 block_tokens() const { return index_.block_tokens(); }
  i32* tail(i64 index) { return &tails_[index * block_tokens()]; }
  Found find_cached(i32 root, const i32* tokens, i64 n);
  Found find_part(i32 root, const i32* tokens, i64 most);
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
  // A sequence opened by the call in progress; its nodes are entered_[first, end).
  struct Admitted {
    i64 handle = 0, tokens = 0;
    Found found;
    std::size_t first = 0, end = 0;
  };
  Admitted admit_one(const i32* tokens, i64 n, i32 root, Reuse reuse, Transaction& tx);
  i64 admit_at(const i32* tokens, i64 n, const PrefixKey& key, Reuse reuse, i64* cached);
  i64 admit_some(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32* handles, i32* cached);
  void give_room(const Admitted& one, Transaction& tx);
  void finish_admission(const Admitted& one, const i32* tokens, i32 root);
  void unenter_from(std::size_t first);
  bool try_adopt(i64 handle, const Found& found, Transaction& tx);
  MatchEnd why_not_more(const PrefixKey& key, i32 root, const i32* tokens, i64 n, i64 found) const;
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
  void unenter_published();
  void apply_retention(const Content& content, i32 node);
  void collect_chain(i64 index);
  void leave_chain(i64 index);
  void leave_node(i32 node) {
    index_.leave(node);
    if (keeps_unheld_ && index_.used(node)) table_->offer(node);
  }
  void collect_leaving(i64 handle, i64 index, i64 tokens);
  void truncate_one(i64 handle, i64 tokens);
  void retract_leaving(i64 index, Transaction& tx);
  void note_truncated(i64 index, i64 tokens);
  i64 pin_node(i32 node, i64* pinned);
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
  const bool has_state_;     // some group is of fixed size
  const bool has_window_;    // some group has a sliding window
  const bool is_simple_;     // one group, which only grows; nothing is zeroed when it does
  const bool keeps_unheld_;  // blocks in use may be held by nobody: those that a window has passed, and snapshots
  Sequences sequences_;
  PrefixIndex index_;
  std::unique_ptr<PageTable> table_;
  std::vector<Content> contents_;      // by sequence
  std::vector<i32> tails_;             // [sequence][block_tokens()]: the known tokens after the last published block
  std::unordered_map<i64, i32> pins_;  // pin -> the last node of its chain
  i64 pins_seen_ = 0, lookup_tokens_ = 0, hit_tokens_ = 0;
  // Scratch of the call in progress, from here to call_: no later call sees what is left there.
  std::vector<i32> chain_, leaving_;
  std::vector<i32> entered_;  // nodes that an admission uses, in the order of enter()
  std::vector<Admitted> admitted_;
  std::vector<PartOfBlock> parts_;
  std::vector<Published> published_;
  std::vector<i64> indices_;
  std::vector<i64> needy_;   // positions in it: who has no room yet
  std::vector<i64> moving_;  // and whose windows move on
  std::vector<i32> due_;     // what is reserved and not committed, of each
  Planned planned_;          // and of all
  std::vector<i32> ones_;
  TableWrites seen_;        // what the call in progress may replace
  std::vector<i64> stamp_;  // by sequence: the last call that named it
  i64 call_ = 0;
  ForkGuard fork_guard_;
};

}  // namespace kvmem
