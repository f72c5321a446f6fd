// What is cached: publishing blocks, taking them over, and which of them are evicted when memory is short.

#include "table/paged/paged_table.h"

namespace kvmem {

bool PagedTable::has_state(i32 node) const {
  for (i64 g = 0; g < groups_; ++g) {
    if (has_state(g) && block_of(node, g) == 0) return false;
  }
  return true;
}

void PagedTable::adopt(i64 index, const std::vector<i32>& chain, const Found& found, Transaction& tx) {
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

void PagedTable::publish(const std::vector<Published>& blocks, Transaction& tx) {
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

void PagedTable::evict(i32 node, Transaction& tx) {
  demote(node, -1, tx);
  for (i64 g = groups_; g-- > 0;) {  // full attention mostly leads: it is told last, as by the other backend
    if (block_of(node, g) != 0) evict_of(node, g, tx);
  }
}

void PagedTable::evict_window(i32 node, i32 window, Transaction& tx) {
  if (index_.copies(node) == 1) unskip_item({node, -1}, tx);
  demote(node, index_.group_of(window), tx);
  evict_of(node, index_.group_of(window), tx);
}

void PagedTable::evict_cut_ends(Transaction& tx) {
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

void PagedTable::snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) {
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth != Growth::fixed || block_of(chain.back(), g) != 0) continue;
    const i64 fresh = take(g, 1, tx);
    tx.push({OpKind::hold, number, chain.back(), g, fresh});
    list_snapshot(blocks_[g], fresh);
    copy_block(g, entry(index, g, 0), fresh, 1, tx);
  }
}

i64 PagedTable::reclaim_kind(Reclaim kind, i64 pages, Transaction& tx) {
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
      if (spare_pages_ < idle_pages_) evict_cut_ends(tx);
      break;
    default:
      break;
  }
  return spare_pages_ - before;
}

void PagedTable::publish_part(const Published& p, i64 g, i64 part, i64 ordinal, std::size_t* expected,
                              Transaction& tx) {
  constexpr std::size_t kAtOnce = 64;
  const i32 own = entry(p.index, g, ordinal), cached = block_of(p.node, g, part);
  if (own == 0 || own == cached) return;
  if (cached == 0) {
    if (*expected == 0) tx.expect(*expected = kAtOnce);
    --*expected;
    attach(g, p.node, own, part, false);
    tx.note({OpKind::hold, number, p.node, g, own, part});
  } else {
    *expected = 0;
    set_fence(blocks_[g], tx.fence());
    set(p.index, g, ordinal, cached, tx);
  }
}

bool PagedTable::is_needed_by_ends(const Blocks& b, i64 g, i32 node, const std::unordered_map<i32, i32>& cut) const {
  i64 needs = 0;
  for (i64 part = 0; part < b.parts; ++part) {
    const i32 block = block_of(node, g, part);
    const auto ends = cut.find(block);
    if (b.info[block].refs != (ends == cut.end() ? 0 : ends->second)) return false;
    needs += b.info[block].refs > 0;
  }
  return index_.needs(node, b.window) == needs;
}

i64 PagedTable::held_pages() const {
  i64 pages = 0;
  for (const Blocks& b : blocks_) {
    for (const SlotClass& c : b.classes) {
      for (i64 slot = c.hold_from; slot < c.hold_to; ++slot) {
        if (c.slots[slot].users + c.slots[slot].cached == 0) pages += c.slots[slot].mapped;
      }
    }
  }
  return pages;
}

i64 PagedTable::reclaim_idle(i64 pages, Transaction& tx) {
  i64 freed = 0;
  if (spare_pages_ == 0) return 0;
  for (Blocks& b : blocks_) {
    for (SlotClass& c : b.classes) {
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

bool PagedTable::evict_next(Transaction& tx) {
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

bool PagedTable::evict_snapshot(Transaction& tx) {
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

bool PagedTable::free_page_of(Item x, Transaction& tx) {
  std::vector<i32> least;
  i32 window = -1;
  for (i64 g = 0; g < groups_; ++g) {
    const Blocks& b = blocks_[g];
    if (block_of(x.node, g) == 0 || (x.window >= 0 ? b.window != x.window : b.window >= 0)) continue;
    for (i64 part = 0; part < b.parts; ++part) {
      const i32 block = block_of(x.node, g, part);
      for (const SlotClass& c : b.classes) {
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

bool PagedTable::find_content(const Blocks& b, const SlotClass& c, i64 slot) {
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
  const auto is_here = [this](i32 node) { return std::find(on_page_.begin(), on_page_.end(), node) != on_page_.end(); };
  return std::all_of(on_page_.begin(), on_page_.end(),
                     [&](i32 node) { return index_.all_cached_children(node, is_here); });
}

void PagedTable::offer_snapshot(Blocks& b, i32 block) {
  const BlockInfo& info = b.info[block];
  if (info.refs > 0 || b.snapshots.has(block)) return;
  if (index_.used(info.node) && !index_.pinned(info.node)) list_snapshot(b, block);
}

}  // namespace kvmem
