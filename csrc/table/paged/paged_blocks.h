// The metadata of the paged backend: the block tables, what each block is (unbacked, ready, referenced, cached) and
// which pages lie under it. paged_table.cpp decides; the mappings and table entries it pushes come back through on_map,
// on_unmap and apply, and change here only, as does what it takes with take_ready() and attach().
//
// Changed by records: pages, table entries, references, nodes. By the journal: the order of snapshots, which ready
// blocks were put off, fences, copy_tail_. Derived: backed, ready, slots, counts; cursor, which only says where to look
// first.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/id_list.h"
#include "base/ready_blocks.h"
#include "base/zero_vector.h"
#include "table/page_table.h"

namespace kvmem {

struct SlotInfo {
  i32 mapped = 0;  // in how many of the arenas it is mapped (all or none, between calls)
  i32 users = 0;   // referenced blocks that touch it
  i32 cached = 0;  // cached blocks that touch it, which nobody refers to
};

struct BlockInfo {
  i32 refs = 0;
  ZeroId node;  // what the block holds, kNoNode for nothing that is known
};

struct SlotClass {
  i64 block_bytes = 0;
  std::vector<i64> arenas;  // numbers within the table
  ZeroVector<SlotInfo> slots;
  i64 hold_from = 0, hold_to = 0;  // slots being prepared at this moment: not to be spilled
  i64 counted_to = 0;              // scratch of a decision: slots before it have been looked at
};

struct Blocks {
  explicit Blocks(Journal& journal) : ready(journal), snapshots(journal) {}

  i64 max_blocks = 0, tokens = 0, per_sequence = 0;
  i64 unit = 0, parts = 1;  // tokens of a node, and how many of these blocks they are
  i64 place = 0;            // of its first among the blocks of a node
  ZeroVector<BlockInfo> info;
  ZeroVector<std::uint8_t> backed;
  ReadyBlocks ready;
  i32 window = -1;   // its number among the groups with a sliding window
  IdList snapshots;  // of a fixed state at tokens that are in use: no table entry refers to them
  std::vector<SlotClass> classes;
  i64 cached = 0;                // cached blocks that nobody refers to
  i64 cursor = kReservedBlocks;  // no unbacked block lies below
  i64 extra_refs = 0;            // references beyond the first, all blocks
  i64 fence = 0;                 // the device may use freed blocks until it has passed
  std::unique_ptr<i32[], void (*)(void*)> table{nullptr, std::free};  // [sequence][per_sequence], 0 is none
};

// Table entries [first, first + count) of a sequence.
struct Entries {
  i64 group, index, first, count;
};

struct BlockMove {
  i32 from, to;
};

class PagedBlocks : public PageTable {
 public:
  PagedBlocks(const Geometry& geometry, PagePool& pool, const Sequences& sequences, PrefixIndex& index);
  ~PagedBlocks() override;

  bool has_reserved(i64 group) const override {
    return blocks_[group].backed[kNullBlock] && blocks_[group].backed[kPaddingBlock];
  }

  bool is_whole(const Op& op) const override;
  std::unique_ptr<FollowRules> rules(const FollowedLengths& lengths) override;  // paged_follow.cpp
  bool owns(i32 arena) const override {
    return arena >= base_arena_ && arena - base_arena_ < static_cast<i32>(pages_.size());
  }
  i64 sequence_at(const Op&) const override { return -1; }  // what a table shows cannot be unmapped
  bool has_memory(i64) const override { return false; }     // but for its entries
  bool holds(i64 index, i64 group) const override;
  void check_tail_again(i64 index, i64 group) override {
    set_copy_tail(index, group, true);
    reset_room(index, group);
  }
  void note_released(const Op& op) override {
    if (op.kind == OpKind::block && op.d != 0) set_fence(blocks_[op.at], pool_.fence());
  }
  void apply(const Op& op, bool undo) override;
  void on_front(i64, i64, i64, i64, bool) override {}  // table entries say what a window needs
  void pin_end(i32, bool) override {}
  bool is_mapped(i32 arena, i64 slot, i64 count) const override;
  void on_map(const Op& op) override { change(op, true); }
  void on_unmap(const Op& op) override { change(op, false); }
  void on_content(const Op& op, bool undo) override;
  void on_taken_back() override {
    let_go(true);
    PageTable::on_taken_back();
  }
  void finish(bool committed) override {
    let_go(false);
    if (!dropped_.empty()) wipe_dropped();
    finish_cuts();
    index_.finish(committed);
  }
  bool can_evict(const Op& op) const override {
    const i32 node = static_cast<i32>(op.a);
    return block_of(node, op.b, op.d) == op.c && (!is_referenced(node, op.b) || !index_.used(node));
  }

  i64 offset_bytes(i64 index, i64 group, i64 a, i64 token) const override {
    const Blocks& b = blocks_[group];
    const i64 bytes = geometry_.groups[group].token_bytes[a];
    return (entry(index, group, quotient(token, b.tokens)) * b.tokens + remainder(token, b.tokens)) * bytes;
  }

  TableView view(i64 group) const override {
    TableView v;
    v.table = blocks_[group].table.get(), v.stride = blocks_[group].per_sequence;
    v.versions = &version_[group], v.groups = groups_;
    return v;
  }

  i64 common_blocks(i64 a, i64 b, i64 group, i64 known) const override;
  i64 block_key(i64 index, i64 group, i64 block) const override { return entry(index, group, block); }
  i64 tokens_that_fit(i64 index, i64 group, i64 pages) const override;
  i64 parked_pages() const override { return idle_pages_; }
  i64 compact(i64 pages, Transaction& tx) override;  // paged_compact.cpp
  void count_bytes(i64* used_bytes, i64* shared_bytes) const override;
  i64 held_bytes() const override;
  i64 beside_bytes() const override;
  i64 cached_bytes(const Blocks& b, const SlotClass& c, i64 slot) const;
  i64 first_arena(i64 group) const override { return base_arena_ + first_[group]; }
  i64 mapped_extent_slots(i64 group, i64 arena_in_group) const override;
  void check(std::vector<std::string>* out) const override;
  void digest(Hasher& hash) const override;  // paged_check.cpp

 protected:
  i64 page_bytes() const { return geometry_.page_bytes; }
  i32 arena(i64 a) const { return static_cast<i32>(base_arena_ + a); }
  i32 entry(i64 index, i64 g, i64 ordinal) const { return blocks_[g].table[index * blocks_[g].per_sequence + ordinal]; }
  i64 first_slot(const SlotClass& c, i64 block) const { return quotient(block * c.block_bytes, page_bytes()); }
  i64 end_slot(const SlotClass& c, i64 block) const { return ceil_div((block + 1) * c.block_bytes, page_bytes()); }

  bool idle(const SlotClass& c, i64 slot) const {
    return c.slots[slot].mapped > 0 && c.slots[slot].users == 0 && c.slots[slot].cached == 0 &&
           (slot < c.hold_from || slot >= c.hold_to);
  }

  // The block of a group that holds the node's tokens, or the given part of them; 0 for none. All parts are there, or
  // none.
  i32 block_of(i32 node, i64 g, i64 part = 0) const {
    const std::size_t at = node * stride_ + blocks_[g].place + part;
    return at < block_of_.size() ? block_of_[at] : 0;
  }
  void set_copy_tail(i64 index, i64 group, bool look) {
    pool_.journal.set(copy_tail_[index * groups_ + group], static_cast<std::uint8_t>(look));
  }
  // A live sequence of before the transaction leaves the block: should the driver fail, it is there again. So nobody
  // writes to the block before the transaction ends, and after the last sequence it stays in use till then.
  void keep_bytes(i64 group, i64 block) {
    const bool last = blocks_[group].info[block].refs == 1;
    kept_.push_back({group, block, last});
    if (last) acquire(blocks_[group], block);
  }
  bool is_kept(i64 group, i64 block) const {
    return std::any_of(kept_.begin(), kept_.end(),
                       [&](const Kept& kept) { return kept.group == group && kept.block == block; });
  }
  void set_fence(Blocks& b, i64 fence) { pool_.journal.set(b.fence, fence); }
  // Whether table entries refer to some block of the node.
  bool is_referenced(i32 node, i64 g) const {
    for (i64 part = 0; part < blocks_[g].parts; ++part) {
      const i32 block = block_of(node, g, part);
      if (block != 0 && blocks_[g].info[block].refs > 0) return true;
    }
    return false;
  }
  // Table entries [first, end) of a sequence of so many tokens are blocks of a node that it does not fill: those of
  // them that others read are copied before it grows. So no block ever belongs to two nodes.
  i64 first_of_tail(const Blocks& b, i64 tokens) const { return quotient(tokens, b.unit) * b.parts; }
  i64 end_of_tail(const Blocks& b, i64 tokens) const { return ceil_div(tokens, b.tokens); }
  // The next ready block, or the next run of at most so many, becomes these entries; returns how many.
  i64 take_ready(Blocks& b, i32* entry);
  i64 take_ready(Blocks& b, i64 most, i32* entries);
  // The node's tokens, or the given part of them, lie in the block from now on; and the inverse. The first part comes
  // first and goes last: the index counts by it.
  void attach(i64 g, i32 node, i32 block, i64 part, bool undo);
  void detach(i64 g, i32 node, i32 block, i64 part, bool undo);
  // The snapshot waits to be given up as the last of those that wait.
  void list_snapshot(Blocks& b, i64 block);

  const Geometry& geometry_;
  PagePool& pool_;
  const Sequences& sequences_;
  i32 base_arena_ = 0;
  i64 stride_ = 0;                         // blocks of a node, all groups
  std::vector<i32> block_of_;              // [node][group][part]
  std::vector<i64> first_;                 // first arena of each group, and one past the last
  std::vector<Blocks> blocks_;             // by group
  std::vector<ZeroVector<ZeroId>> pages_;  // [arena][slot], -1 where nothing is mapped
  ZeroVector<std::uint8_t> copy_tail_;     // [sequence][group]: look whether the tail block is shared before writing
  ZeroVector<std::uint32_t> version_;      // [sequence][group]: counts the entries that were replaced or taken out
  i64 idle_pages_ = 0;                     // mapped, but under no referenced block
  i64 spare_pages_ = 0;                    // and under no cached one

  // Of an allocator that follows another: whether that one may have the block cached, besides the table that shows it.
  bool may_be_cached(i64 g, i64 block) const { return !whole_.empty() && whole_.count(whole_key(g, block)) > 0; }

 private:
  class Rules;
  // Of an allocator that follows another, by group and block: the place where the block was last committed whole, as
  // long as nothing has been written to it since.
  std::unordered_map<i64, i64> whole_;
  static i64 whole_key(i64 g, i64 block) { return g << 32 | block; }
  struct Kept {
    i64 group, block;
    bool in_use;  // it counts as one more reference
  };
  std::vector<Kept> kept_;        // by keep_bytes()
  std::vector<Entries> dropped_;  // by the transaction in progress; they stand in the table until it ends

  i64 group_of(i64 a) const {
    i64 g = 0;
    while (a >= first_[g + 1]) ++g;
    return g;
  }

  const SlotClass& class_of(i64 a) const;
  void add_group(const GroupGeometry& group);
  template <i32 kUsers, i32 kKept>
  void use(SlotClass& c, i64 first, i64 n);
  template <i32 kUsers, i32 kKept>
  void count(Blocks& b, i64 first, i64 n);
  // Nobody refers to the block: it is cached now, or no longer.
  void count_cached(Blocks& b, i64 block);
  void uncount_cached(Blocks& b, i64 block);
  // A cached block to which nobody referred is no longer that.
  void unlist(Blocks& b, i64 block) {
    if (b.snapshots.has(block)) b.snapshots.remove(block);
    --b.cached;
  }
  void acquire(Blocks& b, i64 block, bool undo = false);
  void drop(Blocks& b, i64 block, bool undo);
  void let_go(bool undo) {
    if (kept_.empty()) return;
    for (const Kept& kept : kept_) {
      if (kept.in_use) drop(blocks_[kept.group], kept.block, undo);
    }
    kept_.clear();
  }
  void shift(i64 g, i32 node, i64 from, i64 to);
  void acquire_again(const Entries& entries);
  void drop_all(const Entries& entries);
  void take_back(const Entries& entries);
  void wipe_dropped();
  void move(i64 g, const std::vector<BlockMove>& moves, Transaction& tx);
  void use_last(Blocks& b);
  void change(const Op& op, bool mapped);
  // Trash slots have users before they are mapped; taking such a mapping back must be possible.
  bool growing(const Op& op) const {
    return op.a * page_bytes() < kReservedBlocks * biggest_block(op.at - base_arena_);
  }
  i64 biggest_block(i64 a) const;
  void check_content(i64 g, std::vector<std::string>* out) const;
  // Which blocks over the slots [from, to) of a class are backed now?
  void refresh(Blocks& b, const SlotClass& changed, i64 from, i64 to);
};

}  // namespace kvmem
