// The paged backend (PagedAttention): a sequence is a list of blocks, which kernels read.
//
// The arena is reserved addresses; only pages under blocks in use are backed. So a block is
//   unbacked    some page under it is not mapped;
//   ready       backed, and nobody refers to it: in the intrusive free list (most recently freed first);
//   referenced  refs > 0 table entries (invariants 2 and 3).
// Blocks and pages need not divide each other. Arenas of a group whose tokens have equal size are mapped in lockstep
// and share their bookkeeping: one Class.

#include <algorithm>

#include "paged_blocks.h"

namespace kvmem {
namespace {

class PagedTable final : public PagedBlocks {
 public:
  using PagedBlocks::PagedBlocks;

  bool has_room(i64 index, i64 group, i64 tokens) override {
    const Blocks& b = blocks_[group];
    return !copy_tail_[index * groups_ + group] &&
           ceil_div(tokens, b.tokens) <= ceil_div(sequences_.tokens(index, group), b.tokens);
  }

  void grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override {
    const Blocks& b = blocks_[group];
    if (copy_tail_[index * groups_ + group]) copy_tail(index, group, old_tokens, tx);
    const i64 end = ceil_div(new_tokens, b.tokens);
    for (i64 ordinal = ceil_div(old_tokens, b.tokens); ordinal < end; ++ordinal) {
      set(index, group, ordinal, take(group, end - ordinal, tx), tx);
    }
  }

  void shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override {
    Blocks& b = blocks_[group];
    for (i64 ordinal = ceil_div(old_tokens, b.tokens); ordinal-- > ceil_div(new_tokens, b.tokens);) {
      b.fence = tx.fence();
      set(index, group, ordinal, 0, tx);
    }
    // The block that the length now cuts is copied when the sequence next grows, so that truncating needs no memory.
    if (new_tokens % b.tokens != 0 && b.refs[entry(index, group, new_tokens / b.tokens)] > 1) {
      copy_tail_[index * groups_ + group] = 1;
    }
  }

  void drop_front(i64 index, i64 group, i64 old_first, i64 first, Transaction& tx) override {
    Blocks& b = blocks_[group];
    if (first / b.tokens == old_first / b.tokens) return;
    b.fence = tx.fence();
    for (i64 ordinal = old_first / b.tokens; ordinal < first / b.tokens; ++ordinal) set(index, group, ordinal, 0, tx);
  }

  void share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) override {
    const Blocks& b = blocks_[group];
    const i64 whole = tokens / b.tokens;
    for (i64 ordinal = first / b.tokens; ordinal < whole; ++ordinal) {
      set(child, group, ordinal, entry(parent, group, ordinal), tx);
    }
    const i64 tail = tokens % b.tokens;
    if (tail == 0) return;
    const i64 fresh = take(group, 1, tx);
    set(child, group, whole, fresh, tx);
    copy_block(group, entry(parent, group, whole), fresh, tail, tx);
  }

  void close(i64 index, Transaction& tx) override {
    for (i64 g = 0; g < groups_; ++g) {
      Blocks& b = blocks_[g];  // copy_tail_ stays: it only asks to look, and this may yet be taken back
      if (sequences_.tokens(index, g) == 0) continue;
      b.fence = tx.fence();
      // Last block first: the free list then gives them out again in ascending order.
      const i64 first = sequences_.front(index, g) / b.tokens;
      for (i64 ordinal = ceil_div(sequences_.tokens(index, g), b.tokens); ordinal-- > first;)
        set(index, g, ordinal, 0, tx);
    }
  }

  void back_trash(i64 group, Transaction& tx) override {
    if (!has_trash(group)) back(group, 0, kTrashBlocks, Zero::always, tx);
  }

  // Blocks are taken from backed pages as long as there are any, which costs nothing; there is nothing to prepare.
  bool map_ahead(i64, i64, i64, Transaction&) override { return false; }
  void set_pending(i64, i64) override {}
  i64 pending(i64) const override { return 0; }

  i64 spill(i64 pages, Transaction& tx) override {
    i64 freed = 0;
    if (idle_pages_ == 0) return 0;
    for (Blocks& b : blocks_) {
      for (Class& c : b.classes) {
        const i64 each = static_cast<i64>(c.arenas.size());
        for (i64 slot = static_cast<i64>(c.mapped.size()); slot > 0 && freed < pages;) {
          if (!idle(c, slot - 1)) {
            --slot;
            continue;
          }
          i64 first = slot - 1;
          while (first > 0 && idle(c, first - 1) && freed + each * (slot - first) < pages) --first;
          for (i64 a : c.arenas) unmap(a, first, slot, b.fence, tx);
          freed += each * (slot - first);
          slot = first;
        }
      }
    }
    return freed;
  }

 private:
  void set(i64 index, i64 group, i64 ordinal, i64 block, Transaction& tx) {
    const i32 old = entry(index, group, ordinal);
    tx.push({OpKind::block, static_cast<i32>(group), sequences_.handle_of(index), ordinal, block, old});
  }

  // The next ready block. `wanted`: how many the caller will take in all, so that they are backed in one run.
  i64 take(i64 group, i64 wanted, Transaction& tx) {
    Blocks& b = blocks_[group];
    if (b.ready == 0) {
      i64 first = b.cursor;
      while (first < b.max_blocks && b.backed[first]) ++first;
      b.cursor = first;
      if (first == b.max_blocks)
        throw OutOfMemory("all " + std::to_string(first - kTrashBlocks) + " blocks are in use");
      i64 end = first + 1;
      while (end < b.max_blocks && end - first < wanted && !b.backed[end]) ++end;
      back(group, first, end, geometry_.zero, tx);
    }
    const i64 block = b.next[b.max_blocks];
    if (geometry_.zero == Zero::always) {
      for (const Class& c : b.classes) {
        for (i64 a : c.arenas) tx.push({OpKind::zero, arena(a), block * c.block_bytes, c.block_bytes});
      }
    }
    return block;
  }

  // Maps what is not mapped yet under blocks [first, end).
  void back(i64 group, i64 first, i64 end, Zero zero, Transaction& tx) {
    Blocks& b = blocks_[group];
    for (Class& c : b.classes) c.hold_from = first_slot(c, first), c.hold_to = end_slot(c, end - 1);
    try {
      for (Class& c : b.classes) {
        for (i64 slot = c.hold_from; slot < c.hold_to;) {
          i64 n = 0;
          while (slot + n < c.hold_to && c.mapped[slot + n] == 0) ++n;
          for (i64 a : c.arenas) {
            if (n > 0) pool_.map_slots(*this, arena(a), slot, n, slot > 0 ? pages_[a][slot - 1] : -1, zero, tx);
          }
          slot += std::max(n, i64{1});
        }
      }
    } catch (...) {
      for (Class& c : b.classes) c.hold_from = c.hold_to = 0;
      throw;
    }
    for (Class& c : b.classes) c.hold_from = c.hold_to = 0;
  }

  void copy_tail(i64 index, i64 group, i64 tokens, Transaction& tx) {
    const Blocks& b = blocks_[group];
    const i64 ordinal = tokens / b.tokens, tail = tokens % b.tokens;
    const i32 old = tail == 0 ? 0 : entry(index, group, ordinal);
    if (old == 0 || b.refs[old] <= 1) {
      copy_tail_[index * groups_ + group] = 0;  // the other user has gone
      return;
    }
    // The flag stays set, so that a transaction taken back finds it set again; the next call clears it.
    const i64 fresh = take(group, 1, tx);
    set(index, group, ordinal, fresh, tx);
    copy_block(group, old, fresh, tail, tx);
  }

  void copy_block(i64 group, i64 from, i64 to, i64 tokens, Transaction& tx) {
    const Blocks& b = blocks_[group];
    for (const Class& c : b.classes) {
      for (i64 a : c.arenas) {
        tx.push(
            {OpKind::copy, arena(a), to * c.block_bytes, from * c.block_bytes, tokens * (c.block_bytes / b.tokens)});
      }
    }
  }

  void unmap(i64 a, i64 from, i64 to, i64 fence, Transaction& tx) {
    const std::vector<i32>& pages = pages_[a];
    while (from < to) {
      i64 n = 1;
      while (from + n < to && pages[from + n] == pages[from] + n) ++n;
      tx.push({OpKind::unmap, arena(a), from, pages[from], n, fence});
      from += n;
    }
  }
};

}  // namespace

std::unique_ptr<PageTable> make_paged_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences) {
  return std::make_unique<PagedTable>(geometry, pool, sequences);
}

}  // namespace kvmem
