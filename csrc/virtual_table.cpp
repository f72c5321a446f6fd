// The virtual backend (vAttention's idea): each sequence owns a row, a contiguous range of addresses in every arena of
// every group, and pages are mapped under it as it grows.
//
// A row keeps its mappings when its sequence ends (it is parked), and the next sequence that fits takes it over with no
// driver call. The page is the unit of sharing: share() maps the same page under two rows. Slots [lo, hi) of a row are
// mapped; the frontier is hi in bytes, so a token may straddle two pages.

#include <algorithm>

#include "virtual_rows.h"

namespace kvmem {
namespace {

class VirtualTable final : public VirtualRows {
 public:
  using VirtualRows::VirtualRows;

  bool has_room(i64 index, i64 group, i64 tokens) override {
    const i64 row = row_of_[index];
    if (row < 0) return tokens == 0;
    if (copy_tail_[index * groups_ + group]) return false;
    Row& r = rows_[row];
    if (r.job != 0) {
      // A job that failed is done as well; what it left out is taken back under the next settle().
      if (r.job > pool_.mapper().done() || pool_.mapper().has_failed()) {
        const i64 ready = ready_[row * groups_ + group];
        return tokens <= (ready >= 0 ? ready : room(row, group));
      }
      r.job = 0;
      for (i64 g = 0; g < groups_; ++g) ready_[row * groups_ + g] = -1;
    }
    return tokens <= room(row, group);
  }

  void grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override {
    if (row_of_[index] < 0) bind(index, new_tokens, tx);
    const i64 row = row_of_[index];
    if (copy_tail_[index * groups_ + group]) copy_tail(index, group, old_tokens, tx);
    for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
      const Extent& e = extent(row, a);
      const i64 lo = low_slot(group, a, sequences_.front(index, group));
      const i64 hi = high_slot(group, a, new_tokens);
      if (hi < e.lo) unmap(row, a, e.lo, e.hi, rows_[row].fence, tx);  // what is parked here lies beyond our end
      if (e.count == 0) {
        map(row, a, lo, hi, tx);
      } else {
        if (lo < e.lo) map(row, a, lo, e.lo, tx);
        if (e.hi < hi) map(row, a, e.hi, hi, tx);
      }
    }
  }

  void shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override {
    const i64 row = row_of_[index];
    if (row < 0) return;
    bool frees = false;
    for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
      frees = frees || high_slot(group, a, new_tokens) < high_slot(group, a, old_tokens);
    }
    if (frees) rows_[row].fence = tx.fence();
    if (!rows_[row].maybe_shared) return;
    // Pages that another row shows must not be written here again. Those past the guard go now; the others are replaced
    // when the sequence next grows, so that truncating never needs memory and the guard stays mapped.
    bool shared = false;
    for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
      const Extent& e = extent(row, a);
      const i64 tail = std::max(e.lo, new_tokens * token_bytes(group, a) / page_bytes());
      if (tail >= e.hi || pool_.refs(e.pages[tail]) <= 1) continue;
      const i64 keep = std::max(tail, high_slot(group, a, new_tokens));
      shared = shared || keep > tail;
      unmap(row, a, keep, e.hi, rows_[row].fence, tx);
    }
    if (shared) copy_tail_[index * groups_ + group] = 1;
  }

  // Nothing is unmapped here: that would cost a driver call and a wait for every page a window leaves behind. The front
  // counts as parked from now on and goes when memory is short, in batches.
  void drop_front(i64 index, i64, i64, i64, Transaction& tx) override { rows_[row_of_[index]].fence = tx.fence(); }

  void share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) override {
    if (row_of_[child] < 0) bind_empty(child, tx);
    const i64 from = row_of_[parent], to = row_of_[child];
    rows_[from].maybe_shared = rows_[to].maybe_shared = true;
    for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
      const i64 bytes = tokens * token_bytes(group, a);
      const i64 whole = bytes / page_bytes();
      const Extent& source = extent(from, a);
      for (i64 slot = low_slot(group, a, first); slot < whole;) {
        i64 n = 1;
        while (slot + n < whole && source.pages[slot + n] == source.pages[slot] + n) ++n;
        tx.push({OpKind::map, arena(a), slot_of(to, group, a) + slot, source.pages[slot], n});
        slot += n;
      }
      map(to, a, whole, high_slot(group, a, tokens), tx);
      if (const i64 tail = bytes % page_bytes()) {
        const i64 offset = whole * page_bytes();
        tx.push({OpKind::copy, arena(a), slot_of(to, group, a) * page_bytes() + offset,
                 slot_of(from, group, a) * page_bytes() + offset, tail});
      }
    }
  }

  void close(i64 index, Transaction& tx) override {
    const i64 row = row_of_[index];
    if (row < 0) return;
    rows_[row].fence = tx.fence();
    tx.push({OpKind::unbind, 0, sequences_.handle_of(index), row});
    // copy_tail_ stays: it only asks to look, and should this be taken back, a tail that is shared must still be
    // copied.
  }

  void back_trash(i64 group, Transaction& tx) override {
    for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
      map(0, a, extent(0, a).hi, trash_slots(group, a), tx, Zero::always);
    }
  }

  bool map_ahead(i64 index, i64 group, i64 tokens, Transaction& tx) override {
    const i64 row = row_of_[index];
    const i64 ahead = geometry_.map_ahead_tokens;
    if (row < 0 || rows_[row].job != 0) return false;
    const i64 have = room(row, group);
    if (have - tokens >= ahead || have >= geometry_.groups[group].max_tokens) return false;
    i64 want = 0;
    for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
      want += std::max(i64{0}, high_slot(group, a, tokens + 2 * ahead) - extent(row, a).hi);
    }
    // Preparing is never worth taking something away from anyone.
    if (want == 0 || want > pool_.room_pages() || want > limit_pages - owned_pages) return false;
    ready_[row * groups_ + group] = have;
    for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
      const i64 hi = high_slot(group, a, tokens + 2 * ahead);
      if (extent(row, a).hi < hi) map(row, a, extent(row, a).hi, hi, tx);
    }
    return true;
  }

  // Parked rows first, the one that was freed longest ago leading: its fence has most likely passed. Then what live
  // rows hold beyond their need.
  i64 spill(i64 pages, Transaction& tx) override {
    std::vector<i64> order;
    for (const auto& entry : unbound_) {
      if (entry.slots > 0) order.push_back(entry.row);
    }
    std::sort(order.begin(), order.end(), [this](i64 x, i64 y) {
      return rows_[x].fence != rows_[y].fence ? rows_[x].fence < rows_[y].fence : x < y;
    });
    for (i64 row : row_of_) {
      if (row > 0) order.push_back(row);
    }
    i64 freed = 0;
    for (i64 row : order) {
      for (i64 a = 0, g = 0; a < arenas_ && freed < pages; ++a) {
        while (a >= first_[g + 1]) ++g;
        const Extent& e = extent(row, a);
        i64 lo, hi;
        needed(row, g, a, &lo, &hi);
        const i64 before = owned_pages;
        if (e.lo < std::min(lo, e.hi)) unmap(row, a, e.lo, std::min(lo, e.hi), rows_[row].fence, tx);
        const i64 top = std::max(hi, e.lo);
        if (top < e.hi) {
          const i64 keep = rows_[row].maybe_shared ? 0 : std::max(i64{0}, (e.hi - top) - (pages - freed));
          unmap(row, a, top + keep, e.hi, rows_[row].fence, tx);
        }
        freed += before - owned_pages;
      }
      if (freed >= pages) break;
    }
    return freed;
  }

 private:
  // The smallest parked row that holds enough, else the largest; among equals the first, so that sequences that start
  // together lie at equal distances and a batch of them is one strided tensor. The trash row is never among them.
  void bind(i64 index, i64 tokens, Transaction& tx) {
    i64 need = 0;
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth != Growth::token) continue;
      for (i64 a = first_[g]; a < first_[g + 1]; ++a) need += high_slot(g, a, tokens);
    }
    const Unbound* best = nullptr;
    for (const Unbound& u : unbound_) {
      const bool fits = u.slots >= need, best_fits = best && best->slots >= need;
      if (!best || (fits && !best_fits)) {
        best = &u;
      } else if (fits == best_fits) {
        const i64 better = fits ? best->slots - u.slots : u.slots - best->slots;
        if (better > 0 || (better == 0 && u.row < best->row)) best = &u;
      }
    }
    const i64 row = best->row;  // there are as many rows as sequences
    tx.push({OpKind::bind, 0, sequences_.handle_of(index), row});
    if (rows_[row].maybe_shared) drop_shared(row, tx);
    if (geometry_.zero == Zero::always) zero_row(row, tx);
  }

  // What the last tenant left: its tokens, and whatever it had mapped beyond them.
  void zero_row(i64 row, Transaction& tx) {
    for (i64 a = 0; a < arenas_; ++a) {
      const Extent& e = extent(row, a);
      const i64 from = (slot_of(row, group_of(a), a) + e.lo) * page_bytes();
      if (e.count > 0) tx.push({OpKind::zero, arena(a), from, e.count * page_bytes()});
    }
  }

  // For a row that starts with pages of another one: whatever is parked in it would be in the way.
  void bind_empty(i64 index, Transaction& tx) {
    const Unbound* best = nullptr;
    for (const Unbound& u : unbound_) {
      if (!best || u.slots < best->slots || (u.slots == best->slots && u.row < best->row)) best = &u;
    }
    const i64 row = best->row;
    tx.push({OpKind::bind, 0, sequences_.handle_of(index), row});
    for (i64 a = 0; a < arenas_; ++a) {
      const Extent& e = extent(row, a);
      if (e.count > 0) unmap(row, a, e.lo, e.hi, rows_[row].fence, tx);
    }
  }

  // A parked row may still show pages that a live one shares. They are not ours to write. The mark goes only when there
  // is none: were they dropped and then taken back with a failed transaction, the row would show them unmarked.
  void drop_shared(i64 row, Transaction& tx) {
    bool shared = false;
    for (i64 a = 0; a < arenas_; ++a) {
      const Extent& e = extent(row, a);
      i64 end = e.hi;
      while (end > e.lo && pool_.refs(e.pages[end - 1]) <= 1) --end;
      if (end > e.lo) {
        unmap(row, a, e.lo, end, rows_[row].fence, tx);
        shared = true;
      }
    }
    rows_[row].maybe_shared = shared;
  }

  // Pages from the length on are shared, after a truncation: the one that the length cuts is replaced by a copy of what
  // is used, and those behind it, which were kept as the guard, give way to new ones. The copy is made at the scratch
  // slot behind the last row, since the row's own address still shows the old page.
  void copy_tail(i64 index, i64 group, i64 tokens, Transaction& tx) {
    const i64 row = row_of_[index];
    bool shared = false;
    for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
      const Extent& e = extent(row, a);
      const i64 tail = tokens * token_bytes(group, a) % page_bytes();
      const i64 slot = tokens * token_bytes(group, a) / page_bytes();
      if (slot >= e.hi || slot < e.lo || pool_.refs(e.pages[slot]) <= 1) continue;
      shared = true;
      unmap(row, a, slot + (tail > 0), e.hi, tx.fence(), tx);  // kernels may have read the guard since the truncation
      if (tail > 0) replace_page(row, group, a, slot, tail, tx);
    }
    // Left set when something was shared, so that a transaction taken back finds it set again; cleared by the next one.
    if (!shared) copy_tail_[index * groups_ + group] = 0;
  }

  void replace_page(i64 row, i64 group, i64 a, i64 slot, i64 used_bytes, Transaction& tx) {
    const i64 scratch = geometry_.groups[group].arena_slots[a - first_[group]] - 1;
    const i64 here = slot_of(row, group, a) + slot, old = extent(row, a).pages[slot];
    pool_.map_slots(*this, arena(a), scratch, 1, old, geometry_.zero, tx);
    const i64 fresh = scratch_pages_[a];
    tx.push({OpKind::copy, arena(a), scratch * page_bytes(), here * page_bytes(), used_bytes});
    const i64 fence = tx.new_fence();
    tx.push({OpKind::unmap, arena(a), here, old, 1, fence});
    tx.push({OpKind::map, arena(a), here, fresh, 1});
    tx.push({OpKind::unmap, arena(a), scratch, fresh, 1, fence});
  }

  void map(i64 row, i64 a, i64 from, i64 to, Transaction& tx) { map(row, a, from, to, tx, geometry_.zero); }

  void map(i64 row, i64 a, i64 from, i64 to, Transaction& tx, Zero zero) {
    if (to <= from) return;
    const Extent& e = extent(row, a);
    const i64 near = from > 0 && from <= static_cast<i64>(e.pages.size()) ? e.pages[from - 1] : -1;
    pool_.map_slots(*this, arena(a), slot_of(row, group_of(a), a) + from, to - from, near, zero, tx);
  }

  void unmap(i64 row, i64 a, i64 from, i64 to, i64 fence, Transaction& tx) {
    const Extent& e = extent(row, a);
    const i64 base = slot_of(row, group_of(a), a);
    while (from < to) {
      i64 n = 1;
      while (from + n < to && e.pages[from + n] == e.pages[from] + n) ++n;
      tx.push({OpKind::unmap, arena(a), base + from, e.pages[from], n, fence});
      from += n;
    }
  }
};

}  // namespace

std::unique_ptr<PageTable> make_virtual_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences) {
  return std::make_unique<VirtualTable>(geometry, pool, sequences);
}

}  // namespace kvmem
