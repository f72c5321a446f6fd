// The metadata of the paged backend: the block tables, the state of each block, and the pages under them. It decides
// nothing: PagedTable does, and every change is made by a function below.
//
// Undone by ops: pages, table entries, references, content. Undone by the journal: the order of snapshots, which ready
// blocks are deferred, fences. Derived: backed, ready, slots, counts; the cursor, which only says where to search.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/id_list.h"
#include "base/ready_blocks.h"
#include "base/zero_vector.h"
#include "table/arenas.h"
#include "table/growth_marks.h"

namespace kvmem {

// A slot of the arenas of one SlotClass. Blocks touch a slot if any byte of them lies on it.
struct SlotInfo {
  i32 mapped = 0;  // in how many of the arenas (all or none, between calls)
  i32 users = 0;   // referenced blocks that touch it
  i32 cached = 0;  // cached, unreferenced blocks that touch it
};

struct BlockInfo {
  i32 refs = 0;
  ZeroId node;  // its content, kNoNode if that is not known
};

// The arenas of a group whose blocks have equal size. They are mapped together and share one array of slots.
struct SlotClass {
  i64 block_bytes = 0;
  std::vector<i64> arenas;  // numbers within the table
  ZeroVector<SlotInfo> slots;
  i64 backing_from = 0, backing_to = 0;  // slots that the decision in progress maps: they must not be reclaimed
};

// The blocks of a group.
struct Blocks {
  explicit Blocks(Journal& journal) : ready(journal), snapshots(journal) {}

  i64 max_blocks = 0, tokens = 0, per_sequence = 0;
  i64 unit = 0, parts = 1;  // tokens of a node, and how many blocks they take
  i64 first_part = 0;       // index of the first among the blocks of a node, all groups
  i32 window = -1;          // the group's number among those with a sliding window
  ZeroVector<BlockInfo> info;
  ZeroVector<std::uint8_t> backed;
  ReadyBlocks ready;
  IdList snapshots;  // of a fixed state: blocks in no table that may be evicted although their tokens are in use
  std::vector<SlotClass> classes;
  i64 cached = 0;                // cached, unreferenced blocks
  i64 cursor = kReservedBlocks;  // no unbacked block lies below
  i64 extra_refs = 0;            // references beyond the first, all blocks
  i64 fence = 0;                 // the device may use freed blocks until it has passed
  std::unique_ptr<i32[], void (*)(void*)> table{nullptr, std::free};  // [sequence][per_sequence], 0 is none
};

// Table entries [first, first + count) of a sequence.
struct Entries {
  i64 group, index, first, count;
};

class PagedBlocks : public TableContext {
 public:
  PagedBlocks(const TableContext& context, GrowthMarks& marks);
  ~PagedBlocks();
  PagedBlocks(const PagedBlocks&) = delete;
  PagedBlocks& operator=(const PagedBlocks&) = delete;

  // ---- state ----
  const Blocks& operator[](i64 group) const { return blocks_[group]; }
  i32 entry(i64 index, i64 g, i64 ordinal) const { return blocks_[g].table[index * blocks_[g].per_sequence + ordinal]; }
  const std::uint32_t* versions(i64 group) const { return &version_[group]; }  // of index 0; one for each group follows
  i64 page(i64 a, i64 slot) const { return pages_[a][slot]; }                  // -1 where nothing is mapped
  const ZeroVector<ZeroId>& pages(i64 a) const { return pages_[a]; }
  // Mapped pages under no referenced block; and those that are under no cached block either.
  i64 unreferenced_pages() const { return unreferenced_pages_; }
  i64 empty_pages() const { return empty_pages_; }
  // The block of a group with the given part of the node's tokens; 0 for none. A group has all parts of a node or none.
  i32 block_of(i32 node, i64 g, i64 part = 0) const {
    const std::size_t at = node * stride_ + blocks_[g].first_part + part;
    return at < block_of_.size() ? block_of_[at] : 0;
  }
  // Whether the transaction in progress keeps the block's bytes.
  bool is_kept(i64 group, i64 block) const {
    return std::any_of(kept_.begin(), kept_.end(),
                       [&](const Kept& kept) { return kept.group == group && kept.block == block; });
  }

  // ---- derived from it ----
  i64 first_slot(const SlotClass& c, i64 block) const { return quotient(block * c.block_bytes, page_bytes()); }
  i64 end_slot(const SlotClass& c, i64 block) const { return ceil_div((block + 1) * c.block_bytes, page_bytes()); }
  bool is_empty(const SlotClass& c, i64 slot) const {
    return c.slots[slot].mapped > 0 && c.slots[slot].users == 0 && c.slots[slot].cached == 0 &&
           (slot < c.backing_from || slot >= c.backing_to);
  }
  const SlotClass& class_of(i64 a) const;
  bool has_reserved(i64 group) const {
    return blocks_[group].backed[kNullBlock] && blocks_[group].backed[kPaddingBlock];
  }
  bool is_mapped(i64 a, i64 slot, i64 count) const;
  bool is_whole(const Op& op) const;
  bool holds(i64 index, i64 group) const;
  // Whether a table entry refers to a block of the node.
  bool is_referenced(i32 node, i64 g) const {
    for (i64 part = 0; part < blocks_[g].parts; ++part) {
      const i32 block = block_of(node, g, part);
      if (block != 0 && blocks_[g].info[block].refs > 0) return true;
    }
    return false;
  }
  bool can_evict(const Op& op) const {
    const i32 node = static_cast<i32>(op.a);
    return block_of(node, op.b, op.d) == op.c && (!is_referenced(node, op.b) || !index_.used(node));
  }
  // Entries [first_of_tail, end_of_tail) of a sequence of `tokens` tokens are blocks of a node that it fills in part.
  // Those that others read are copied before it grows, so that no block ever belongs to two nodes.
  i64 first_of_tail(const Blocks& b, i64 tokens) const { return quotient(tokens, b.unit) * b.parts; }
  i64 end_of_tail(const Blocks& b, i64 tokens) const { return ceil_div(tokens, b.tokens); }
  // Whether nothing but its one sequence reads the block.
  bool is_own(const Blocks& b, i64 block) const { return b.info[block].refs <= 1 && b.info[block].node == kNoNode; }
  // The lowest block with missing pages, or max_blocks; and how many pages a block misses.
  i64 first_unbacked(i64 group);
  i64 missing_pages(i64 group, i64 block) const;
  // Returns the unbacked blocks from `first` on, at most `wanted`, for which `room` pages suffice (but at least the
  // first), and how many pages they miss.
  struct Run {
    i64 end, pages;
  };
  Run unbacked_run(i64 group, i64 first, i64 wanted, i64 room) const;

  // ---- changes that ops describe ----
  void on_map(const Op& op) { change(op, true); }
  void on_unmap(const Op& op) { change(op, false); }
  void apply(const Op& op, bool undo);  // block, acquire, drop
  void on_copy(const Op& op, bool undo);
  // The next ready blocks, at most `most` consecutive ones, become entries from `first` on, which were none; returns
  // how many. REQUIRES: there is a ready block. May throw std::bad_alloc, and has changed nothing then.
  struct Allocated {
    i64 block, count;
  };
  Allocated allocate(i64 index, i64 group, i64 first, i64 most);
  // The given part of the node's tokens lies in the block from now on. Part 0 is attached first and detached last,
  // because the index counts it. May throw std::bad_alloc, and has changed nothing then.
  void attach(i64 g, i32 node, i32 block, i64 part, bool undo);

  // ---- other changes; the journal undoes those of fences and lists ----
  void set_fence(i64 group, i64 fence) { pool_.journal.set(blocks_[group].fence, fence); }
  // A sequence that was live before the transaction leaves the block. If the driver fails, it will have it again: the
  // block is not overwritten before the transaction ends, and stays in use if the sequence was the last.
  void keep_bytes(i64 group, i64 block) {
    const bool last = blocks_[group].info[block].refs == 1;
    kept_.push_back({group, block, last});
    if (last) acquire(blocks_[group], block, false);
  }
  // The pages under blocks [first, end) are being mapped; that has ended.
  void begin_backing(i64 group, i64 first, i64 end);
  void end_backing(i64 group);
  // A snapshot may be evicted, as the last of those that may; it may not.
  void list_snapshot(i64 group, i64 block) { blocks_[group].snapshots.add_last(block); }
  void unlist_snapshot(i64 group, i64 block) { blocks_[group].snapshots.remove(block); }
  // Ready blocks on empty pages are allocated after all others, so that these pages stay empty.
  void defer_empty_pages(i64 group);
  void undo_kept() { release_kept(true); }
  void finish();

  void check(i64 owned_pages, std::vector<std::string>* out) const;
  void digest(Hasher& hash) const;

  // In an allocator that follows another: the index at which a block was last committed whole, as long as nothing has
  // been written to it since. The leader may have such a block cached besides the table that contains it.
  std::unordered_map<i64, i64> followed_whole;
  std::unordered_map<i64, i64> followed_stored;  // the same for what host slots have, by offset
  static i64 whole_key(i64 g, i64 block) { return g << 32 | block; }
  bool may_be_cached(i64 g, i64 block) const {
    return !followed_whole.empty() && followed_whole.count(whole_key(g, block)) > 0;
  }

 private:
  struct Kept {
    i64 group, block;
    bool referenced;  // with one more reference
  };

  void add_group(const GroupGeometry& group);
  template <i32 kUsers, i32 kCached>
  void count_on(SlotClass& c, i64 first, i64 n);
  template <i32 kUsers, i32 kCached>
  void count(Blocks& b, i64 first, i64 n);
  // An unreferenced block becomes cached; is no longer cached; is no longer cached, because it is referenced.
  void enter_cached(Blocks& b, i64 block);
  void leave_cached(Blocks& b, i64 block);
  void unlist(Blocks& b, i64 block) {
    KVMEM_ASSERT(b.cached > 0, "cached blocks are counted");
    if (b.snapshots.has(block)) b.snapshots.remove(block);
    --b.cached;
  }
  void acquire(Blocks& b, i64 block, bool undo);
  void drop(Blocks& b, i64 block, bool undo);
  void acquire_again(const Entries& entries);  // undoes drop_all()
  void drop_all(const Entries& entries);
  void take_back(const Entries& entries);  // undoes allocate()
  void detach(i64 g, i32 node, i32 block, i64 part, bool undo);
  void shift(i64 g, i32 node, i64 from, i64 to);
  void release_kept(bool undo);
  void change(const Op& op, bool mapped);
  // Whether a map or unmap is of the reserved blocks, which have users before they are mapped.
  bool is_of_reserved(const Blocks& b, const Op& op) const;
  void update_backed(Blocks& b, const SlotClass& changed, i64 from, i64 to);
  void check_tables(i64 g, std::vector<i32>* refs, std::vector<std::string>* out) const;
  void check_blocks(i64 g, const std::vector<i32>& refs, std::vector<std::string>* out) const;
  void check_content(i64 g, std::vector<std::string>* out) const;
  struct PageCounts {
    i64 mapped = 0, unreferenced = 0, empty = 0;
  };
  void check_slots(i64 g, const std::vector<i32>& refs, PageCounts* pages, std::vector<std::string>* out) const;

  GrowthMarks& marks_;
  std::vector<Blocks> blocks_;             // by group
  i64 stride_ = 0;                         // blocks of a node, all groups
  std::vector<i32> block_of_;              // [node][group][part]
  std::vector<ZeroVector<ZeroId>> pages_;  // [arena][slot], -1 where nothing is mapped
  ZeroVector<std::uint32_t> version_;      // [sequence][group]: counts the entries that were replaced or removed
  i64 unreferenced_pages_ = 0, empty_pages_ = 0;
  std::vector<Kept> kept_;        // by keep_bytes()
  std::vector<Entries> dropped_;  // by the transaction in progress; they stay in the table until it ends
};

}  // namespace kvmem
