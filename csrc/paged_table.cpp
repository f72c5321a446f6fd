// The paged backend (PagedAttention): a sequence is a list of blocks, which kernels read.
//
// The arena is reserved addresses; only pages under blocks in use are backed. So a block is
//   unbacked    some page under it is not mapped;
//   ready       backed, and nobody refers to it: in the free list, lowest first (ready_blocks.h);
//   cached      backed, nobody refers to it, but the content index knows what it holds;
//   referenced  refs > 0 table entries (invariants 2 and 3), its content known or not.
// Blocks and pages need not divide each other. Arenas of a group whose tokens have equal size are mapped in lockstep
// and share their bookkeeping: one Class.

#include <algorithm>

#include "paged_blocks.h"

namespace kvmem {
namespace {

class PagedTable final : public PagedBlocks {
 public:
  using PagedBlocks::PagedBlocks;

  i64 find_room(i64 index, i64 group) override {
    return copy_tail_[index * groups_ + group] ? 0 : round_up(sequences_.tokens(index, group), blocks_[group].tokens);
  }

  void grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override {
    const Blocks& b = blocks_[group];
    if (copy_tail_[index * groups_ + group]) copy_tail(index, group, old_tokens, tx);
    const i64 end = ceil_div(new_tokens, b.tokens);
    for (i64 ordinal = ceil_div(old_tokens, b.tokens), n = 0; ordinal < end; ordinal += n) {
      if (geometry_.zero == Zero::always || pool_.recording) {
        set(index, group, ordinal, take(group, end - ordinal, tx), tx), n = 1;
      } else {
        n = take_run(index, group, ordinal, end - ordinal, tx);
      }
    }
  }

  void shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override {
    Blocks& b = blocks_[group];
    for (i64 ordinal = ceil_div(old_tokens, b.tokens); ordinal-- > ceil_div(new_tokens, b.tokens);) {
      set_fence(b, tx.fence());
      set(index, group, ordinal, 0, tx);
    }
    // The block that the length now cuts is copied when the sequence next grows, so that truncating needs no memory.
    if (remainder(new_tokens, b.tokens) == 0) return;
    const i32 cut = entry(index, group, quotient(new_tokens, b.tokens));
    if (b.info[cut].refs > 1 || b.info[cut].node != kNoNode) look_at_tail(index, group);
  }

  void drop_front(i64 index, i64 group, i64 old_first, i64 first, Transaction& tx) override {
    Blocks& b = blocks_[group];
    if (quotient(first, b.tokens) == quotient(old_first, b.tokens)) return;
    set_fence(b, tx.fence());
    for (i64 ordinal = quotient(old_first, b.tokens); ordinal < quotient(first, b.tokens); ++ordinal) {
      const i32 block = entry(index, group, ordinal);
      set(index, group, ordinal, 0, tx);
      if (b.info[block].refs == 0 && b.info[block].node != kNoNode && !index_.pinned(b.info[block].node))
        pass(b, block);
    }
  }

  void share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) override {
    const Blocks& b = blocks_[group];
    const i64 whole = quotient(tokens, b.tokens);
    for (i64 ordinal = quotient(first, b.tokens); ordinal < whole; ++ordinal) {
      set(child, group, ordinal, entry(parent, group, ordinal), tx);
    }
    const i64 tail = remainder(tokens, b.tokens);
    if (tail == 0) return;
    const i64 fresh = take(group, 1, tx);
    set(child, group, whole, fresh, tx);
    copy_block(group, entry(parent, group, whole), fresh, tail, tx);
  }

  Found find(const std::vector<i32>& chain, i64 tokens) const override {
    Found best;
    std::vector<i64> run(groups_, 0);  // blocks on end that are there, up to the one looked at
    for (i64 k = 0; k < static_cast<i64>(chain.size()); ++k) {
      const i64 whole = (k + 1) * block_tokens(), end = std::min(tokens, whole);
      bool all = true;
      for (i64 g = 0; g < groups_; ++g) {
        const GroupGeometry& group = geometry_.groups[g];
        const bool there = block_of(chain[k], g) != 0;
        run[g] = there ? run[g] + 1 : 0;
        if (group.growth == Growth::fixed) {
          all = all && there && end == whole;
        } else {
          const i64 first = window_first(group, geometry_.tail_guard_tokens, end) / group.block_tokens;
          all = all && run[g] >= k + 1 - first;
          if (group.window_tokens == 0 && !there) return best;
        }
      }
      if (all) best.tokens = end;
    }
    return best;
  }

  // What is taken over is referred to, or kept from being given up, before any memory is looked for.
  void adopt(i64 index, const std::vector<i32>& chain, const Found& found, Transaction& tx) override {
    const i64 whole = quotient(found.tokens, block_tokens()), tail = remainder(found.tokens, block_tokens());
    Kept kept(*this, chain[tail > 0 ? whole : whole - 1]);
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth == Growth::fixed) continue;
      for (i64 ordinal = quotient(sequences_.front(index, g), block_tokens()); ordinal < whole; ++ordinal) {
        set(index, g, ordinal, block_of(chain[ordinal], g), tx);
      }
    }
    for (i64 g = 0; g < groups_; ++g) {
      const bool state = geometry_.groups[g].growth == Growth::fixed;
      if (!state && tail == 0) continue;
      const i64 fresh = take(g, 1, tx);
      set(index, g, state ? 0 : whole, fresh, tx);
      copy_block(g, block_of(chain[state ? whole - 1 : whole], g), fresh, state ? 1 : tail, tx);
    }
    kept.end();
  }

  bool has(i32 node, i64 group) const override { return block_of(node, group) != 0; }

  // A block that is cached already takes the place of the sequence's own, so that its content is held once.
  void publish(const std::vector<Published>& blocks, Transaction& tx) override {
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth != Growth::token) continue;
      for (const Published& p : blocks) {
        const i32 own = entry(p.index, g, p.ordinal), cached = block_of(p.node, g);
        if (own == 0 || own == cached) continue;
        if (cached == 0) {
          tx.expect();
          hold(g, p.node, own, false);
          tx.note({OpKind::hold, arena(0), p.node, g, own});
        } else {
          set_fence(blocks_[g], tx.fence());
          set(p.index, g, p.ordinal, cached, tx);
        }
      }
    }
  }

  void retract(i64, i32, Transaction&) override {}  // its blocks have left the table, or are marked to be copied

  void evict(i32 node, Transaction& tx) override {
    for (i64 g = 0; g < groups_; ++g) {
      if (const i32 block = block_of(node, g)) tx.push({OpKind::evict, arena(0), node, g, block});
    }
  }

  // Where a window has passed it in those that remain, or it is a snapshot: no table entry refers to it.
  void offer(i32 node) override {
    for (i64 g = 0; g < groups_; ++g) {
      if (const i32 block = block_of(node, g)) offer_block(blocks_[g], block);
    }
  }

  void snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) override {
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth != Growth::fixed || block_of(chain.back(), g) != 0) continue;
      const i64 fresh = take(g, 1, tx);
      tx.push({OpKind::hold, arena(0), chain.back(), g, fresh});
      pass(blocks_[g], fresh);
      copy_block(g, entry(index, g, 0), fresh, 1, tx);
    }
  }

  std::vector<i64> shared_pieces(i64 index, i64 group, i64 token) const override {
    const Blocks& b = blocks_[group];
    const i32 block = remainder(token, b.tokens) == 0 ? 0 : entry(index, group, quotient(token, b.tokens));
    return {block != 0 && b.info[block].refs > 1 ? block : -1};
  }

  void close(i64 index, Transaction& tx) override {
    for (i64 g = 0; g < groups_; ++g) {
      Blocks& b = blocks_[g];
      if (sequences_.tokens(index, g) == 0) continue;
      set_fence(b, tx.fence());
      const i64 first = quotient(sequences_.front(index, g), b.tokens);
      const i64 end = ceil_div(sequences_.tokens(index, g), b.tokens);
      const i32 last = entry(index, g, end - 1);
      if (!pool_.recording) {
        tx.push({OpKind::hide, arena(0), index, first, end - first, g});
      } else {
        for (i64 ordinal = end; ordinal-- > first;) set(index, g, ordinal, 0, tx);
      }
      // A truncation may have left it with a block that it does not publish any more: nobody else will offer that.
      if (copy_tail_[index * groups_ + g]) offer_block(b, last);
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
    i64 freed = spill_idle(pages, tx);
    // Cached blocks go one by one, but the pages under them are looked for in batches.
    for (i64 blocks = 1; freed < pages && give_up(blocks, tx); blocks *= 2) freed += spill_idle(pages - freed, tx);
    return freed;
  }

 private:
  i64 block_tokens() const { return index_.block_tokens(); }

  // Takes the blocks of a node out of the lists of passed ones for a while.
  class Kept {
   public:
    Kept(PagedTable& table, i32 node) : table_(table) {
      for (i64 g = 0; node != kNoNode && g < table.groups_; ++g) {
        const i32 block = table.block_of(node, g);
        if (block == 0 || !table.blocks_[g].passed.has(block)) continue;
        blocks_.emplace_back(g, block);
        table.blocks_[g].passed.remove(block);
      }
    }
    // Puts them back; where an error has come instead, the journal does.
    void end() {
      for (const auto& [g, block] : blocks_) {
        Blocks& b = table_.blocks_[g];
        if (b.info[block].refs == 0) table_.pass(b, block);
      }
    }
    Kept(const Kept&) = delete;
    Kept& operator=(const Kept&) = delete;

   private:
    PagedTable& table_;
    std::vector<std::pair<i64, i32>> blocks_;
  };

  i64 spill_idle(i64 pages, Transaction& tx) {
    i64 freed = 0;
    if (idle_pages_ == 0) return 0;
    for (Blocks& b : blocks_) {
      for (Class& c : b.classes) {
        const i64 each = static_cast<i64>(c.arenas.size());
        for (i64 slot = static_cast<i64>(c.slots.size()); slot > 0 && freed < pages;) {
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

  // Gives up the content of cached blocks, least valuable first; false if there is none.
  bool give_up(i64 blocks, Transaction& tx) {
    bool any = false;
    for (; blocks > 0 && give_up_one(tx); --blocks) any = true;
    return any;
  }

  bool give_up_one(Transaction& tx) {
    for (i64 g = 0; g < groups_; ++g) {
      if (!has_state(g) && give_up_passed(g, tx)) return true;
    }
    const i32 node = index_.victim();
    if (node != kNoNode) {
      forget(node, tx);
      return true;
    }
    for (i64 g = 0; g < groups_; ++g) {
      if (has_state(g) && give_up_passed(g, tx)) return true;
    }
    return false;
  }

  bool has_state(i64 g) const { return geometry_.groups[g].growth == Growth::fixed; }

  // What a window has passed goes first: a hit needs it only if it ends just there. Snapshots of tokens that are in use
  // stand in such a list too, and go last. What is pinned goes with its node.
  bool give_up_passed(i64 g, Transaction& tx) {
    Blocks& b = blocks_[g];
    i64 block = b.passed.first();
    for (; block != 0 && index_.pinned(b.info[block].node); block = b.passed.first()) b.passed.remove(block);
    if (block != 0) tx.push({OpKind::evict, arena(0), b.info[block].node, g, block});
    return block != 0;
  }

  void set(i64 index, i64 group, i64 ordinal, i64 block, Transaction& tx) {
    const i32 old = entry(index, group, ordinal);
    tx.push({OpKind::block, static_cast<i32>(group), sequences_.handle_of(index), ordinal, block, old});
  }

  // The next ready block. `wanted`: how many the caller will take in all, so that they are backed in one run.
  i64 take(i64 group, i64 wanted, Transaction& tx) {
    Blocks& b = blocks_[group];
    if (b.ready.empty()) make_ready(group, wanted, tx);
    const i64 block = b.ready.first();
    if (geometry_.zero == Zero::always) {
      for (const Class& c : b.classes) {
        for (i64 a : c.arenas) tx.push({OpKind::zero, arena(a), block * c.block_bytes, c.block_bytes});
      }
    }
    return block;
  }

  // Entries from `first` on become the next ready blocks, `most` at most; returns how many.
  i64 take_run(i64 index, i64 group, i64 first, i64 most, Transaction& tx) {
    Blocks& b = blocks_[group];
    if (b.ready.empty()) make_ready(group, most, tx);
    tx.expect();
    b.ready.expect(most);
    i32* const entries = &b.table[index * b.per_sequence + first];
    const i64 n = most == 1 ? take_ready(b, entries) : take_ready(b, most, entries);
    tx.note({OpKind::show, arena(0), index, first, n, group});
    return n;
  }

  // New pages as long as there are any; then cached blocks of this group, whose pages stay as they are; at last pages
  // from under whatever else is parked.
  void make_ready(i64 group, i64 wanted, Transaction& tx) {
    Blocks& b = blocks_[group];
    const i64 first = unbacked(group);
    if (!has_room_for(b, first)) {
      if (!has_state(group) && give_up_passed(group, tx)) return;
      for (i32 node; b.kept > 0 && b.ready.empty() && (node = index_.victim()) != kNoNode;) forget(node, tx);
      if (!b.ready.empty() || give_up_passed(group, tx)) return;
    }
    if (first == b.max_blocks) throw OutOfMemory("all " + std::to_string(first - kTrashBlocks) + " blocks are in use");
    i64 end = first + 1;
    while (end < b.max_blocks && end - first < wanted && !b.backed[end]) ++end;
    back(group, first, end, geometry_.zero, tx);
  }

  // The lowest block with pages missing, or max_blocks.
  i64 unbacked(i64 group) {
    Blocks& b = blocks_[group];
    while (b.cursor < b.max_blocks && b.backed[b.cursor]) ++b.cursor;
    return b.cursor;
  }

  // True if the pages that are missing under the block can be had without taking any from elsewhere.
  bool has_room_for(const Blocks& b, i64 block) const {
    if (block == b.max_blocks) return false;
    i64 pages = 0;
    for (const Class& c : b.classes) {
      for (i64 slot = first_slot(c, block); slot < end_slot(c, block); ++slot) {
        if (c.slots[slot].mapped == 0) pages += static_cast<i64>(c.arenas.size());
      }
    }
    return pages <= std::min(pool_.room_pages(), limit_pages - owned_pages);
  }

  // Maps what is not mapped yet under blocks [first, end).
  void back(i64 group, i64 first, i64 end, Zero zero, Transaction& tx) {
    Blocks& b = blocks_[group];
    for (Class& c : b.classes) c.hold_from = first_slot(c, first), c.hold_to = end_slot(c, end - 1);
    try {
      for (Class& c : b.classes) {
        for (i64 slot = c.hold_from; slot < c.hold_to;) {
          i64 n = 0;
          while (slot + n < c.hold_to && c.slots[slot + n].mapped == 0) ++n;
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

  // What a node in use holds, and no sequence refers to, may be given up from now on.
  void offer_block(Blocks& b, i32 block) {
    const BlockInfo& info = b.info[block];
    if (info.refs > 0 || info.node == kNoNode || b.passed.has(block)) return;
    if (index_.used(info.node) && !index_.pinned(info.node)) pass(b, block);
  }

  void copy_tail(i64 index, i64 group, i64 tokens, Transaction& tx) {
    Blocks& b = blocks_[group];
    const i64 ordinal = quotient(tokens, b.tokens), tail = remainder(tokens, b.tokens);
    const i32 old = tail == 0 ? 0 : entry(index, group, ordinal);
    if (old == 0 || (b.info[old].refs <= 1 && b.info[old].node == kNoNode)) {
      return set_copy_tail(index, group, false);  // the other user has gone
    }
    if (b.info[old].refs <= 1 && !index_.used(b.info[old].node) && b.ready.empty() &&
        !has_room_for(b, unbacked(group))) {
      set_copy_tail(index, group, false);
      return forget(b.info[old].node, tx);  // rather than another cached block, or failing
    }
    const i64 fresh = take(group, 1, tx);
    set(index, group, ordinal, fresh, tx);
    copy_block(group, old, fresh, tail, tx);
    set_copy_tail(index, group, false);
    if (b.info[old].refs > 0) return;
    set_fence(b, tx.new_fence());  // behind the copy: the block may be given up, and its page go
    offer_block(b, old);
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

std::unique_ptr<PageTable> make_paged_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences,
                                            PrefixIndex& index) {
  return std::make_unique<PagedTable>(geometry, pool, sequences, index);
}

}  // namespace kvmem
