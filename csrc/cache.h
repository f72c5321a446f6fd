// The allocator's core: sequences over one of the two page tables. Python-free and device-free but for the pool's
// space. Any number of threads may call; the pool's lock serialises them, also across allocators that share the pool.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "batch.h"
#include "fork_guard.h"
#include "geometry.h"
#include "page_table.h"
#include "pages.h"
#include "sequences.h"

namespace kvmem {

struct CacheStats {
  i64 budget_bytes = 0, created_bytes = 0, free_bytes = 0;
  i64 mapped_bytes = 0, used_bytes = 0, parked_bytes = 0, shared_bytes = 0;
  i64 num_sequences = 0, driver_calls = 0, physical_bytes = 0;
};

class Cache final : public TableState {
 public:
  // `owns_pool`: no other allocator uses the pool, so its budget follows set_memory().
  Cache(Geometry geometry, std::shared_ptr<PagePool> pool, bool paged, i64 limit_pages, bool owns_pool);
  ~Cache() override;

  // `group` -1 stands for every group that grows with the sequence's tokens.
  void open(i64 count, i32* handles);
  void extend(const i32* handles, const i32* counts, i64 n, i64 group);
  void commit(const i32* handles, const i32* counts, i64 n, i64 group);
  void truncate(i64 handle, i64 tokens);
  i64 fork(i64 handle);
  void free(const i32* handles, i64 n);

  i64 tokens(i64 handle, i64 group);
  i64 committed(i64 handle, i64 group);
  i64 first_token(i64 handle, i64 group);
  void lengths(const i32* handles, i64 n, i64 group, i64* tokens, i64* committed);
  Placement place(i64 handle, i64 group);
  std::vector<i64> handles();  // of the live sequences, by place

  // Writes one group's metadata for these sequences, then padding rows up to `rows`. `new_tokens` null: what is
  // reserved but not committed. SpecError when a buffer is too small; nothing is promised about its contents then.
  BatchSizes fill(const i32* handles, i64 n, const i32* new_tokens, i64 group, i64 rows, const BatchBuffers& out);

  // out[i]: how many leading whole blocks sequences i and i + 1 have in common, as memory; n - 1 entries. 0 throughout
  // for groups with a window and for states.
  void common_blocks(const i32* handles, i64 n, i64 group, i64* out);
  // A permutation of 0 .. n - 1 that puts sequences with common blocks side by side, nested groups within the outer
  // ones. Groups stand where their first member stood. Cost: as common_blocks() of neighbours in that order, and what
  // is left of n^2 small steps where groups are nested n deep.
  void cascade_order(const i32* handles, i64 n, i64 group, i64* order);

  i64 trim(i64 bytes);  // parked and free pages to the system; -1 for all; returns the bytes given back
  // How much this allocator may map. With a pool of its own this is the pool's budget too.
  void set_memory(i64 pages);
  CacheStats stats();
  std::vector<std::string> check();
  bool paged() const { return paged_; }
  const Geometry& geometry() const { return geometry_; }
  PagePool& pool() { return *pool_; }
  i64 first_arena(i64 group) const { return table_->first_arena(group); }
  i64 mapped_extent_bytes(i64 group, i64 arena_in_group);

  // The other half of the design: what was decided, and deciding nothing but following.
  void record();
  std::vector<Op> take_ops();
  void apply(const std::vector<Op>& ops);

  void apply_table(const Op& op) override;

 private:
  using Lock = std::unique_lock<std::mutex>;
  Lock enter(bool look = false);  // look: the books only
  void settle();
  void leave();
  void free_one(i64 index, Transaction& tx);
  i64 group_begin(i64 group) const { return group < 0 ? 0 : group; }
  i64 group_end(i64 group) const { return group < 0 ? groups_ : group + 1; }
  bool grows(i64 g, i64 group) const { return group >= 0 || geometry_.groups[g].growth == Growth::token; }
  void check_group(i64 group) const;
  void follow(const std::vector<Op>& ops, Transaction& tx);
  void check_once(i64 index);
  bool plan_extend(const i32* handles, const i32* counts, i64 n, i64 group);
  void grow(const i32* handles, const i32* counts, i64 n, i64 group);
  void grow_one(i64 index, i64 count, i64 group, Transaction& tx);
  [[noreturn]] void explain(i64 index, i64 count, i64 group, const std::string& why);
  void map_ahead(i64 n, i64 group);
  bool lacks_trash(i64 g, i64 tokens) const;
  i64 window_front(i64 index, i64 g, i64 committed) const;
  void set_length(i64 index, i64 g, i64 tokens, Transaction& tx);
  void set_committed(i64 index, i64 g, i64 tokens, Transaction& tx);
  void set_front(i64 index, i64 g, i64 token, Transaction& tx);
  BatchRow step_of(i64 handle, i64 g, const i32* new_tokens);
  bool can_share(i64 g) const;
  void arrange(const std::vector<i64>& places, i64 depth, i64 g, i64** order) const;
  struct Alike {  // sequences with `blocks` blocks in common
    std::vector<i64> places;
    i64 blocks;
  };
  void split(std::vector<i64> places, i64 depth, i64 g, std::vector<Alike>* groups) const;
  void share_group(i64 parent, i64 child, i64 g, Transaction& tx);

  Geometry geometry_;
  std::shared_ptr<PagePool> pool_;
  const bool paged_, owns_pool_;
  const i64 groups_;
  const i64 token_group_;  // the first group that grows with the tokens, or 0
  Sequences sequences_;
  std::unique_ptr<PageTable> table_;
  std::vector<i64> indices_;  // of the call in progress
  std::vector<i64> stamp_;    // by sequence: the last call that named it
  i64 call_ = 0;
  ForkGuard fork_guard_;
};

}  // namespace kvmem
