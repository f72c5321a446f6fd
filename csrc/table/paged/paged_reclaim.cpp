// Reclaiming memory: what each kind of reclaim frees, and which content is evicted for it.

#include <algorithm>

#include "table/paged/paged_table.h"

namespace kvmem {

i64 PagedTable::reclaim_kind(Reclaim kind, i64 pages, Transaction& tx) {
  const i64 before = kind == Reclaim::idle ? backing_pages() : blocks_.empty_pages();
  const auto wants = [&] { return blocks_.empty_pages() - before < pages; };
  switch (kind) {
    case Reclaim::victims:
      evict_in_order(tx, wants, [&](Item x) { return free_page_of(x, tx) ? Outcome::evicted : Outcome::skipped; });
      break;
    case Reclaim::snapshots:  // and pages that several nodes have blocks on
      while (wants() && evict_next(tx)) continue;
      break;
    case Reclaim::out_of_window:
      if (blocks_.empty_pages() < blocks_.unreferenced_pages()) evict_truncated_ends(tx);
      break;
    default:
      break;
  }
  return blocks_.empty_pages() - before;
}

i64 PagedTable::backing_pages() const {
  i64 pages = 0;
  for (i64 g = 0; g < groups_; ++g) {
    for (const SlotClass& c : blocks_[g].classes) {
      for (i64 slot = c.backing_from; slot < c.backing_to; ++slot) {
        if (c.slots[slot].users + c.slots[slot].cached == 0) pages += c.slots[slot].mapped;
      }
    }
  }
  return pages;
}

i64 PagedTable::unmap_empty(i64 pages, Transaction& tx) {
  i64 freed = 0;
  if (blocks_.empty_pages() == 0) return 0;
  for (i64 g = 0; g < groups_; ++g) {
    for (const SlotClass& c : blocks_[g].classes) {
      const i64 each = static_cast<i64>(c.arenas.size());
      for (i64 slot = static_cast<i64>(c.slots.size()); slot > 0 && freed < pages;) {
        if (!blocks_.is_empty(c, slot - 1)) {
          --slot;
          continue;
        }
        i64 first = slot - 1;
        while (first > 0 && blocks_.is_empty(c, first - 1) && freed + each * (slot - first) < pages) --first;
        for (i64 a : c.arenas) {
          const auto page = [&](i64 at) { return blocks_.page(a, at); };
          unmap_runs(a, 0, first, slot, blocks_[g].fence, page, tx);
        }
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
        return Outcome::evicted;
      });
  return any || evict_snapshot(tx);
}

bool PagedTable::evict_snapshot(Transaction& tx) {
  for (i64 g = 0; g < groups_; ++g) {
    const Blocks& b = blocks_[g];
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
    if (blocks_.block_of(x.node, g) == 0 || (x.window >= 0 ? b.window != x.window : b.window >= 0)) continue;
    for (i64 part = 0; part < b.parts; ++part) {
      const i32 block = blocks_.block_of(x.node, g, part);
      for (const SlotClass& c : b.classes) {
        for (i64 slot = blocks_.first_slot(c, block); slot < blocks_.end_slot(c, block) && least.size() != 1; ++slot) {
          if (!find_content_on(b, c, slot) || (!least.empty() && on_page_.size() >= least.size())) continue;
          least = on_page_, window = b.window;
        }
      }
    }
  }
  for (i32 node : least) evict_item({node, window}, tx);
  return !least.empty();
}

bool PagedTable::find_content_on(const Blocks& b, const SlotClass& c, i64 slot) {
  constexpr i64 kMostOnPage = 512;  // beyond it, one page would cost too much content
  on_page_.clear();
  const i64 end = std::min(b.max_blocks, ceil_div((slot + 1) * page_bytes(), c.block_bytes));
  const i64 first = quotient(slot * page_bytes(), c.block_bytes);
  if (c.slots[slot].users > 0 || end - first > kMostOnPage || (slot >= c.backing_from && slot < c.backing_to))
    return false;
  for (i64 block = first; block < end; ++block) {
    const i32 node = b.info[block].node;
    if (node == kNoNode) continue;
    if (b.window >= 0 ? index_.needs(node, b.window) > 0 : index_.used(node)) return false;
    on_page_.push_back(node);
  }
  if (b.parts > 1) {  // a node may have several blocks on the slot
    std::sort(on_page_.begin(), on_page_.end());
    on_page_.erase(std::unique(on_page_.begin(), on_page_.end()), on_page_.end());
  }
  if (b.window >= 0) return true;
  std::sort(on_page_.begin(), on_page_.end(), [this](i32 p, i32 q) { return index_.ordinal(p) > index_.ordinal(q); });
  const auto is_here = [this](i32 node) { return std::find(on_page_.begin(), on_page_.end(), node) != on_page_.end(); };
  return std::all_of(on_page_.begin(), on_page_.end(),
                     [&](i32 node) { return index_.all_cached_children(node, is_here); });
}

}  // namespace kvmem
