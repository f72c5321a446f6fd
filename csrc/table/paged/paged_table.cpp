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
#include <limits>
#include <unordered_map>

#include "table/paged/paged_blocks.h"

namespace kvmem {
namespace {

class PagedTable final : public PagedBlocks {
 public:
  using PagedBlocks::PagedBlocks;

  i64 find_room(i64 index, i64 group) override {
    const i64 tokens = sequences_.tokens(index, group);
    if (copy_tail_[index * groups_ + group] || has_cut(index, group, tokens)) return 0;
    return round_up(tokens, blocks_[group].tokens);
  }

  void grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override {
    const Blocks& b = blocks_[group];
    if (copy_tail_[index * groups_ + group]) copy_tail(index, group, old_tokens, tx);
    if (has_cut(index, group, new_tokens)) zero_cut(index, group, old_tokens, new_tokens, tx);
    const i64 end = ceil_div(new_tokens, b.tokens);
    for (i64 ordinal = ceil_div(old_tokens, b.tokens), n = 0; ordinal < end; ordinal += n) {
      n = take_run(index, group, ordinal, end - ordinal, tx);
    }
  }

  void zero_cut(i64 index, i64 group, i64 tokens, Transaction& tx) override {
    zero_cut(index, group, tokens, tokens, tx);
  }

  void shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override {
    Blocks& b = blocks_[group];
    note_cut(index, group, old_tokens);
    for (i64 ordinal = ceil_div(old_tokens, b.tokens); ordinal-- > ceil_div(new_tokens, b.tokens);) {
      set_fence(b, tx.fence());
      set(index, group, ordinal, 0, tx);
    }
    // The blocks of the node that the length now cuts are copied when the sequence next grows, so that truncating needs
    // no memory.
    for (i64 ordinal = first_of_tail(b, new_tokens); ordinal < end_of_tail(b, new_tokens); ++ordinal) {
      const i32 cut = entry(index, group, ordinal);
      if (b.info[cut].refs > 1 || b.info[cut].node != kNoNode) return look_at_tail(index, group);
    }
  }

  void drop_front(i64 index, i64 group, i64 old_first, i64 first, Transaction& tx) override {
    Blocks& b = blocks_[group];
    const i64 begin = quotient(old_first, b.tokens), end = quotient(first, b.tokens);
    if (begin == end) return;
    set_fence(b, tx.fence());
    for (i64 ordinal = end; ordinal-- > begin;) set(index, group, ordinal, 0, tx);  // the last goes first, as ever
  }

  void share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) override {
    const Blocks& b = blocks_[group];
    const i64 tail = first_of_tail(b, tokens), end = end_of_tail(b, tokens);
    for (i64 ordinal = quotient(first, b.tokens); ordinal < tail; ++ordinal) {
      set(child, group, ordinal, entry(parent, group, ordinal), tx);
    }
    for (i64 ordinal = tail; ordinal < end; ++ordinal) {
      const i64 fresh = take(group, end - ordinal, tx);
      set(child, group, ordinal, fresh, tx);
      copy_block(group, entry(parent, group, ordinal), fresh, std::min(b.tokens, tokens - ordinal * b.tokens), tx);
    }
  }

  i64 find_row(const std::vector<i32>&, i64) const override { return 0; }

  bool has_state(i32 node) const override {
    for (i64 g = 0; g < groups_; ++g) {
      if (has_state(g) && block_of(node, g) == 0) return false;
    }
    return true;
  }

  // What is taken over is referred to, or kept from being given up, before any memory is looked for. The caller needs
  // what windows hold of it.
  void adopt(i64 index, const std::vector<i32>& chain, const Found& found, Transaction& tx) override {
    const i64 whole = quotient(found.tokens, block_tokens()), tail = remainder(found.tokens, block_tokens());
    KeptSnapshots kept(*this, chain[tail > 0 ? whole : whole - 1]);
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth == Growth::fixed) continue;
      const i64 parts = blocks_[g].parts;
      for (i64 node = quotient(sequences_.front(index, g), block_tokens()); node < whole; ++node) {
        for (i64 part = 0; part < parts; ++part) {
          set(index, g, node * parts + part, block_of(chain[node], g, part), tx);
        }
      }
    }
    for (i64 g = 0; g < groups_; ++g) {
      const Blocks& b = blocks_[g];
      const bool state = geometry_.groups[g].growth == Growth::fixed;
      const i64 parts = state ? 1 : ceil_div(tail, b.tokens);
      if (parts == 0) continue;  // nothing is copied
      const i64 node = chain[state ? whole - 1 : whole];
      for (i64 part = 0; part < parts; ++part) {
        const i64 fresh = take(g, parts - part, tx);
        set(index, g, state ? 0 : whole * b.parts + part, fresh, tx);
        copy_block(g, block_of(node, g, part), fresh, state ? 1 : std::min(b.tokens, tail - part * b.tokens), tx);
      }
      set_fence(blocks_[g], tx.new_fence());  // what was copied may go, and its page, when nobody refers to it
    }
    kept.end();
  }

  bool has(i32 node, i64 group) const override { return block_of(node, group) != 0; }

  // A block that is cached already takes the place of the sequence's own, so that its content is held once.
  void publish(const std::vector<Published>& blocks, Transaction& tx) override {
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth != Growth::token) continue;
      const i64 parts = blocks_[g].parts;
      std::size_t expected = 0;  // records that need no more memory
      for (const Published& p : blocks) {
        if (parts == 1) {
          publish_part(p, g, 0, p.ordinal, &expected, tx);
        } else if (entry(p.index, g, (p.ordinal + 1) * parts - 1) != 0) {
          for (i64 part = 0; part < parts; ++part) publish_part(p, g, part, p.ordinal * parts + part, &expected, tx);
        }
      }
    }
  }

  void retract(i64, i32, Transaction&) override {}  // its blocks have left the table, or are marked to be copied

  void evict(i32 node, Transaction& tx) override {
    demote(node, -1, tx);
    for (i64 g = groups_; g-- > 0;) {  // full attention mostly leads: it is told last, as by the other backend
      if (block_of(node, g) != 0) evict_of(node, g, tx);
    }
  }

  // Where it was all that there is of the node, the node goes with it.
  void evict_window(i32 node, i32 window, Transaction& tx) override {
    if (index_.places(node) == 1) name_again({node, -1}, tx);
    demote(node, index_.group_of(window), tx);
    evict_of(node, index_.group_of(window), tx);
  }

  void forget_cut_ends(Transaction& tx) override {
    for (i64 g = 0; g < groups_; ++g) {
      const Blocks& b = blocks_[g];
      if (b.window < 0) continue;
      std::unordered_map<i32, i32> cut;  // by block: how many sequences end within its node
      std::vector<i32> nodes;
      for (i64 index = 0; index < sequences_.capacity(); ++index) {
        const i64 tokens = sequences_.tokens(index, g);
        for (i64 ordinal = first_of_tail(b, tokens); ordinal < end_of_tail(b, tokens); ++ordinal) {
          const i32 block = entry(index, g, ordinal);
          if (b.info[block].node != kNoNode && cut[block]++ == 0) nodes.push_back(b.info[block].node);
        }
      }
      for (i32 node : nodes) {
        if (block_of(node, g) != 0 && is_needed_by_ends(b, g, node, cut)) evict_window(node, b.window, tx);
      }
    }
  }

  void offer(i32 node) override {
    for (i64 g = 0; g < groups_; ++g) {
      if (const i32 block = has_state(g) ? block_of(node, g) : 0) offer_snapshot(blocks_[g], block);
    }
  }

  void snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) override {
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth != Growth::fixed || block_of(chain.back(), g) != 0) continue;
      const i64 fresh = take(g, 1, tx);
      tx.push({OpKind::hold, number, chain.back(), g, fresh});
      list_snapshot(blocks_[g], fresh);
      copy_block(g, entry(index, g, 0), fresh, 1, tx);
    }
  }

  std::vector<i64> shared_pieces(i64 index, i64 group, i64 from, i64 end) const override {
    const Blocks& b = blocks_[group];
    std::vector<i64> pieces;
    for (i64 ordinal = quotient(from, b.tokens); ordinal < std::max(ceil_div(from, b.tokens), ceil_div(end, b.tokens));
         ++ordinal) {
      const i32 block = entry(index, group, ordinal);
      pieces.push_back(block != 0 && b.info[block].refs > 1 ? block : -1);
    }
    return pieces;
  }

  void close(i64 index, Transaction& tx) override {
    for (i64 g = 0; g < groups_; ++g) {
      Blocks& b = blocks_[g];
      forget_room(index, g);  // also where it refers to no block: the next sequence at this place has none either
      if (sequences_.tokens(index, g) == 0) continue;
      set_fence(b, tx.fence());
      const i64 first = quotient(sequences_.front(index, g), b.tokens);
      const i64 end = ceil_div(sequences_.tokens(index, g), b.tokens);
      if (first == end) continue;  // its window holds none of them
      tx.push({OpKind::drop, static_cast<i32>(g), sequences_.handle_of(index), first, end - first});
    }
  }

  void back_trash(i64 group, Transaction& tx) override {
    if (!has_trash(group)) back(group, 0, kTrashBlocks, Zero::always, tx);
  }

  // Blocks are taken from backed pages as long as there are any, which costs nothing; there is nothing to prepare.
  bool map_ahead(i64, i64, i64, Transaction&) override { return false; }
  void set_pending(i64, i64) override {}
  i64 pending(i64) const override { return 0; }

  // Pages that hold nothing are given first and unmapped last, all of them in runs.
  i64 give(Reclaim kind, i64 pages, Transaction& tx) override {
    const i64 before = kind == Reclaim::idle ? held_pages() : spare_pages_;
    const auto wants = [&] { return spare_pages_ - before < pages; };
    switch (kind) {
      case Reclaim::victims:
        evict_in_order(tx, wants, [&](Item x) { return free_page_of(x, tx) ? Named::evicted : Named::aside; });
        break;
      case Reclaim::spares:  // and pages that several have blocks in
        while (wants() && evict_next(tx)) continue;
        break;
      case Reclaim::out_of_window:
        if (spare_pages_ < idle_pages_) forget_cut_ends(tx);
        break;
      default:
        break;
    }
    return spare_pages_ - before;
  }
  i64 finish_spill(i64 pages, i64, Transaction& tx) override { return spill_idle(pages, tx); }

 private:
  i64 block_tokens() const { return index_.block_tokens(); }

  void publish_part(const Published& p, i64 g, i64 part, i64 ordinal, std::size_t* expected, Transaction& tx) {
    constexpr std::size_t kAtOnce = 64;
    const i32 own = entry(p.index, g, ordinal), cached = block_of(p.node, g, part);
    if (own == 0 || own == cached) return;
    if (cached == 0) {
      if (*expected == 0) tx.expect(*expected = kAtOnce);
      --*expected;
      hold(g, p.node, own, part, false);
      tx.note({OpKind::hold, number, p.node, g, own, part});
    } else {
      *expected = 0;
      set_fence(blocks_[g], tx.fence());
      set(p.index, g, ordinal, cached, tx);
    }
  }

  // `cut`: how many of a block's references are such ends. A pin needs the node besides its blocks.
  bool is_needed_by_ends(const Blocks& b, i64 g, i32 node, const std::unordered_map<i32, i32>& cut) const {
    i64 needs = 0;
    for (i64 part = 0; part < b.parts; ++part) {
      const i32 block = block_of(node, g, part);
      const auto ends = cut.find(block);
      if (b.info[block].refs != (ends == cut.end() ? 0 : ends->second)) return false;
      needs += b.info[block].refs > 0;
    }
    return index_.needs(node, b.window) == needs;
  }

  void evict_of(i32 node, i64 g, Transaction& tx) {
    for (i64 part = blocks_[g].parts; part-- > 0;) {
      tx.push({OpKind::evict, number, node, g, block_of(node, g, part), part});
    }
  }

  // Takes the snapshots of a node out of the lists of those that may be given up, for a while.
  class KeptSnapshots {
   public:
    KeptSnapshots(PagedTable& table, i32 node) : table_(table) {
      for (i64 g = 0; g < table.groups_; ++g) {
        const i32 block = table.block_of(node, g);
        if (block == 0 || !table.blocks_[g].snapshots.has(block)) continue;
        blocks_.emplace_back(g, block);
        table.blocks_[g].snapshots.remove(block);
      }
    }
    // Puts them back; where an error has come instead, the journal does.
    void end() {
      for (const auto& [g, block] : blocks_) {
        Blocks& b = table_.blocks_[g];
        if (b.info[block].refs == 0) table_.list_snapshot(b, block);
      }
    }
    KeptSnapshots(const KeptSnapshots&) = delete;
    KeptSnapshots& operator=(const KeptSnapshots&) = delete;

   private:
    PagedTable& table_;
    std::vector<std::pair<i64, i32>> blocks_;
  };

  // Pages without users and content that are being prepared just now, and not to be taken away.
  i64 held_pages() const {
    i64 pages = 0;
    for (const Blocks& b : blocks_) {
      for (const Class& c : b.classes) {
        for (i64 slot = c.hold_from; slot < c.hold_to; ++slot) {
          if (c.slots[slot].users + c.slots[slot].kept == 0) pages += c.slots[slot].mapped;
        }
      }
    }
    return pages;
  }

  i64 spill_idle(i64 pages, Transaction& tx) {
    i64 freed = 0;
    if (spare_pages_ == 0) return 0;
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

  bool has_state(i64 g) const { return geometry_.groups[g].growth == Growth::fixed; }

  // Evicts the next item of the eviction order; after all of them, snapshots of tokens that are in use. False if there
  // is nothing left.
  bool evict_next(Transaction& tx) {
    bool any = false;
    evict_in_order(
        tx, [&] { return !any; },
        [&](Item x) {
          evict_item(x, tx);
          any = true;
          return Named::evicted;
        });
    return any || evict_snapshot(tx);
  }

  // What is pinned goes with its node.
  bool evict_snapshot(Transaction& tx) {
    for (i64 g = 0; g < groups_; ++g) {
      Blocks& b = blocks_[g];
      i64 block = b.snapshots.first();
      while (block != 0 && index_.pinned(b.info[block].node)) block = b.snapshots.next(block);
      if (block == 0) continue;
      demote(b.info[block].node, g, tx);
      tx.push({OpKind::evict, number, b.info[block].node, g, block});
      return true;
    }
    return false;
  }

  // Evicts the item and what else lies on one of its pages, the one with the least besides, so that this page comes
  // free. False, and nothing has happened, where none of its pages could.
  bool free_page_of(Item x, Transaction& tx) {
    std::vector<i32> least;
    i32 window = -1;
    for (i64 g = 0; g < groups_; ++g) {
      const Blocks& b = blocks_[g];
      if (block_of(x.node, g) == 0 || (x.window >= 0 ? b.window != x.window : b.window >= 0)) continue;
      for (i64 part = 0; part < b.parts; ++part) {
        const i32 block = block_of(x.node, g, part);
        for (const Class& c : b.classes) {
          for (i64 slot = first_slot(c, block); slot < end_slot(c, block) && least.size() != 1; ++slot) {
            if (!find_content(b, c, slot) || (!least.empty() && on_page_.size() >= least.size())) continue;
            least = on_page_, window = b.window;
          }
        }
      }
    }
    for (i32 node : least) evict_item({node, window}, tx);
    return !least.empty();
  }

  // What is cached on the page at a slot, in on_page_, a block before those it continues; false where that cannot all
  // be evicted without losing more.
  bool find_content(const Blocks& b, const Class& c, i64 slot) {
    constexpr i64 kMostOnPage = 512;  // else too much would be lost by chance
    on_page_.clear();
    const i64 end = std::min(b.max_blocks, ceil_div((slot + 1) * page_bytes(), c.block_bytes));
    const i64 first = quotient(slot * page_bytes(), c.block_bytes);
    if (c.slots[slot].users > 0 || end - first > kMostOnPage || (slot >= c.hold_from && slot < c.hold_to)) return false;
    for (i64 block = first; block < end; ++block) {
      const i32 node = b.info[block].node;
      if (node == kNoNode) continue;
      if (b.window >= 0 ? index_.needs(node, b.window) > 0 : index_.used(node)) return false;
      on_page_.push_back(node);
    }
    if (b.parts > 1) {  // a node may have several blocks here
      std::sort(on_page_.begin(), on_page_.end());
      on_page_.erase(std::unique(on_page_.begin(), on_page_.end()), on_page_.end());
    }
    if (b.window >= 0) return true;
    std::sort(on_page_.begin(), on_page_.end(), [this](i32 p, i32 q) { return index_.ordinal(p) > index_.ordinal(q); });
    const auto is_here = [this](i32 node) {
      return std::find(on_page_.begin(), on_page_.end(), node) != on_page_.end();
    };
    return std::all_of(on_page_.begin(), on_page_.end(),
                       [&](i32 node) { return index_.all_cached_children(node, is_here); });
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
    if (zeroes_blocks()) zero_blocks(b, block, 1, tx);
    return block;
  }

  // Kernels that load whole tiles read a block to its end, and multiply what lies behind the length by 0.
  bool zeroes_blocks() const { return guarded_ || geometry_.zero == Zero::always; }

  void zero_blocks(const Blocks& b, i64 first, i64 n, Transaction& tx) {
    for (const Class& c : b.classes) {
      for (i64 a : c.arenas) tx.push({OpKind::zero, arena(a), first * c.block_bytes, n * c.block_bytes});
    }
  }

  // Zeroes [tokens, end of what was cut off) in the block that `old_tokens` cut; any later one is new, and zero.
  void zero_cut(i64 index, i64 group, i64 old_tokens, i64 tokens, Transaction& tx) {
    const Blocks& b = blocks_[group];
    const i64 end = std::min(cut_to(index, group), round_up(old_tokens, b.tokens));
    if (tokens < end) {
      const i64 block = entry(index, group, quotient(tokens, b.tokens)), first = remainder(tokens, b.tokens);
      if (block < kTrashBlocks || b.info[block].refs > 1 || b.info[block].node != kNoNode) return;
      if (is_kept(group, block) || may_be_cached(group, block)) return;
      for (const Class& c : b.classes) {
        const i64 token_bytes = c.block_bytes / b.tokens, at = block * c.block_bytes + first * token_bytes;
        for (i64 a : c.arenas) tx.push({OpKind::zero, arena(a), at, (end - tokens) * token_bytes});
      }
    }
    forget_cut(index, group);
  }

  // Entries from `first` on become the next run of ready blocks, `most` at most; returns how many.
  i64 take_run(i64 index, i64 group, i64 first, i64 most, Transaction& tx) {
    Blocks& b = blocks_[group];
    if (b.ready.empty()) make_ready(group, most, tx);
    if (zeroes_blocks()) zero_blocks(b, b.ready.first(), std::min(b.ready.run(b.ready.first()), most), tx);
    tx.expect();
    b.ready.expect(most);
    i32* const entries = &b.table[index * b.per_sequence + first];
    const i64 n = most == 1 ? take_ready(b, entries) : take_ready(b, most, entries);
    tx.note({OpKind::acquire, static_cast<i32>(group), sequences_.handle_of(index), first, n, entries[0]});
    return n;
  }

  // New pages, or pages without content, as long as there are any. Then what is evicted next: of this group it leaves a
  // block that is ready; of another it goes only if a page comes free by it.
  void make_ready(i64 group, i64 wanted, Transaction& tx) {
    Blocks& b = blocks_[group];
    const auto wants = [&] { return b.ready.empty() && !back_some(group, wanted, tx); };
    evict_in_order(tx, wants, [&](Item x) {
      const bool here = block_of(x.node, group) != 0 && (x.window < 0 || x.window == b.window);
      if (!here) return free_page_of(x, tx) ? Named::evicted : Named::aside;
      evict_item(x, tx);
      return Named::evicted;
    });
    while (wants()) {
      if (evict_next(tx)) continue;
      if (unbacked(group) == b.max_blocks)
        throw OutOfMemory("all " + std::to_string(b.max_blocks - kTrashBlocks) + " blocks are in use");
      back(group, unbacked(group), unbacked(group) + 1, geometry_.zero, tx);  // from another allocator's content
    }
  }

  // Backs the next blocks, `wanted` at most, as far as no content has to go for them; false if there is no room for
  // one.
  bool back_some(i64 group, i64 wanted, Transaction& tx) {
    Blocks& b = blocks_[group];
    const i64 first = unbacked(group);
    if (first == b.max_blocks) return false;
    const i64 least = missing_pages(b, first);
    const i64 at_hand = pool_.pages_at_hand(*this);
    // Counting a run takes a step for each of its blocks: not where there is no room for one.
    if (pool_.make_room(*this, least, false, tx) < least) return false;
    // Room for all that is wanted is made at once: then each arena is mapped, and zeroed, in one run.
    const i64 room =
        at_hand < least ? pool_.make_room(*this, run_behind(b, first, wanted, kNoLimit).pages, false, tx) : at_hand;
    back(group, first, run_behind(b, first, wanted, room).end, geometry_.zero, tx);
    return true;
  }

  static constexpr i64 kNoLimit = std::numeric_limits<i64>::max();
  struct Run {
    i64 end, pages;
  };

  // Of the unbacked blocks from `first` on, the first and as many more as `room` pages suffice for, `wanted` in all at
  // most; and the pages that they need.
  Run run_behind(Blocks& b, i64 first, i64 wanted, i64 room) const {
    Run run{first + 1, missing_pages(b, first)};
    for (Class& c : b.classes) c.counted_to = end_slot(c, first);
    for (; run.end < b.max_blocks && run.end - first < wanted && !b.backed[run.end]; ++run.end) {
      i64 pages = run.pages;
      for (Class& c : b.classes) {
        for (const i64 to = end_slot(c, run.end); c.counted_to < to; ++c.counted_to) {
          if (c.slots[c.counted_to].mapped == 0) pages += static_cast<i64>(c.arenas.size());
        }
      }
      if (pages > room) break;
      run.pages = pages;
    }
    return run;
  }

  // The lowest block with pages missing, or max_blocks.
  i64 unbacked(i64 group) {
    Blocks& b = blocks_[group];
    while (b.cursor < b.max_blocks && b.backed[b.cursor]) ++b.cursor;
    return b.cursor;
  }

  // How many pages are missing under the block.
  i64 missing_pages(const Blocks& b, i64 block) const {
    i64 pages = 0;
    for (const Class& c : b.classes) {
      for (i64 slot = first_slot(c, block); slot < end_slot(c, block); ++slot) {
        if (c.slots[slot].mapped == 0) pages += static_cast<i64>(c.arenas.size());
      }
    }
    return pages;
  }

  bool has_room_for(const Blocks& b, i64 block) const {
    return block < b.max_blocks && missing_pages(b, block) <= pool_.pages_at_hand(*this);
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
            if (n > 0) pool_.map_slots(*this, arena(a), slot, n, slot > 0 ? i64{pages_[a][slot - 1]} : -1, zero, tx);
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

  // A snapshot of a node in use, which no sequence refers to, may be given up from now on.
  void offer_snapshot(Blocks& b, i32 block) {
    const BlockInfo& info = b.info[block];
    if (info.refs > 0 || b.snapshots.has(block)) return;
    if (index_.used(info.node) && !index_.pinned(info.node)) list_snapshot(b, block);
  }

  void copy_tail(i64 index, i64 group, i64 tokens, Transaction& tx) {
    const Blocks& b = blocks_[group];
    for (i64 ordinal = first_of_tail(b, tokens); ordinal < end_of_tail(b, tokens); ++ordinal) {
      copy_shared(index, group, ordinal, std::min(b.tokens, tokens - ordinal * b.tokens), tx);
    }
    set_copy_tail(index, group, false);
  }

  // Unless nobody else reads the block of a tail, `tokens` of which are the sequence's.
  void copy_shared(i64 index, i64 group, i64 ordinal, i64 tokens, Transaction& tx) {
    Blocks& b = blocks_[group];
    const i32 old = entry(index, group, ordinal);
    const bool is_own = b.info[old].refs <= 1 && b.info[old].node == kNoNode;
    if (old == 0 || (is_own && !(guarded_ && is_kept(group, old)))) return;  // a guard is zeroed in the call itself
    if (b.info[old].refs <= 1 && !index_.used(b.info[old].node) && b.ready.empty() &&
        !has_room_for(b, unbacked(group))) {
      return forget(b.info[old].node, tx);  // rather than another cached block, or failing
    }
    const i64 fresh = take(group, 1, tx);
    const bool last = b.info[old].refs == 1;
    keep_bytes(group, old);
    set(index, group, ordinal, fresh, tx);
    copy_block(group, old, fresh, tokens, tx);
    if (last) set_fence(b, tx.new_fence());  // behind the copy: the block may go, and its page
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
    const ZeroVector<ZeroId>& pages = pages_[a];
    while (from < to) {
      i64 n = 1;
      while (from + n < to && pages[from + n] == pages[from] + n) ++n;
      tx.push({OpKind::unmap, arena(a), from, pages[from], n, fence});
      from += n;
    }
  }

  std::vector<i32> on_page_;  // what find_content() found
};

}  // namespace

std::unique_ptr<PageTable> make_paged_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences,
                                            PrefixIndex& index) {
  return std::make_unique<PagedTable>(geometry, pool, sequences, index);
}

}  // namespace kvmem
