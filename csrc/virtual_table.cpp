// The virtual backend (vAttention's idea): each sequence owns a row, a contiguous range of addresses in every arena of
// every group, and pages are mapped under it as it grows.
//
// A row keeps its mappings when its sequence ends (it is parked), and the next sequence that fits takes it over with no
// driver call. The page is the unit of sharing: share() maps the same page under two rows. Slots [lo, hi) of a row are
// mapped; the frontier is hi in bytes, so a token may straddle two pages.

#include <algorithm>
#include <unordered_map>

#include "page_table.h"
#include "shared_parts.h"

namespace kvmem {
namespace {

struct Extent {
  i64 lo = 0, hi = 0, count = 0;  // [lo, hi) is the hull of what is mapped; count == hi - lo between calls
  std::vector<i32> pages;         // by slot of the row, -1 where nothing is mapped
};

struct Row {
  i64 index = -1;             // the sequence it belongs to
  i64 fence = 0;              // the device may use what lies here until this fence has passed
  i64 job = 0;                // the mapper's job that maps part of it, 0 for none
  i64 slots = 0;              // mapped, all arenas
  i64 place = -1;             // in unbound_
  bool maybe_shared = false;  // some page may be mapped elsewhere too
};

class VirtualTable final : public PageTable {
 public:
  VirtualTable(const Geometry& geometry, PagePool& pool, const Sequences& sequences)
      : geometry_(geometry),
        pool_(pool),
        sequences_(sequences),
        groups_(static_cast<i64>(geometry.groups.size())),
        rows_(geometry.max_sequences + 1),
        row_of_(geometry.max_sequences, -1) {
    limit_pages = pool.budget_pages();
    pool.add_owner(this);
    try {
      for (const GroupGeometry& group : geometry.groups) {
        first_.push_back(arenas_);
        for (std::size_t i = 0; i < group.token_bytes.size(); ++i, ++arenas_) {
          const i32 arena = pool.add_arena(this, group.arena_slots[i]);
          if (arenas_ == 0) base_arena_ = arena;
        }
      }
    } catch (...) {
      pool.remove_owner(this, {});
      throw;
    }
    first_.push_back(arenas_);
    extents_.resize(rows_.size() * arenas_);
    scratch_pages_.assign(arenas_, -1);
    room_.assign(rows_.size() * groups_, -1);
    ready_.assign(rows_.size() * groups_, -1);
    copy_tail_.assign(row_of_.size() * groups_, 0);
    for (i64 row = static_cast<i64>(rows_.size()) - 1; row > 0; --row)
      add_unbound(row);  // row 0 holds the trash blocks
  }

  ~VirtualTable() override {
    std::vector<i32> pages;
    for (const Extent& e : extents_) pages.insert(pages.end(), e.pages.begin() + e.lo, e.pages.begin() + e.hi);
    pool_.remove_owner(this, pages);
  }

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
  bool has_trash(i64 group) const override {
    const i64 a = first_[group + 1] - 1;  // arenas are mapped together
    return extent(0, a).hi == trash_slots(group, a);
  }

  void look_at_tail(i64 index, i64 group) override { copy_tail_[index * groups_ + group] = 1; }

  bool is_whole(const Op& op) const override {
    const i64 a = op.at - base_arena_;
    if (a < 0 || a >= arenas_) return true;  // a neighbour's
    const i64 g = group_of(a);
    if (op.a == geometry_.groups[g].arena_slots[a - first_[g]] - 1) return scratch_pages_[a] < 0;
    const Extent& e = extent(op.a / row_slots(g, a), a);
    return e.count == e.hi - e.lo;
  }

  bool holds(i64 index, i64 group) const override {
    const i64 row = row_of_[index], tokens = sequences_.tokens(index, group);
    if (tokens == 0) return sequences_.live(index) || row < 0;
    for (i64 a = first_[group]; row > 0 && a < first_[group + 1]; ++a) {
      const Extent& e = extent(row, a);
      const i64 lo = low_slot(group, a, sequences_.front(index, group));
      if (e.lo > lo || e.hi < high_slot(group, a, tokens) || e.count != e.hi - e.lo) return false;
      const i64 tail = tokens * token_bytes(group, a) / page_bytes();
      if (tail < e.hi && pool_.refs(e.pages[tail]) > 1 && !copy_tail_[index * groups_ + group]) return false;
    }
    return row > 0;
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

  void set_pending(i64 index, i64 job) override { rows_[row_of_[index]].job = job; }
  i64 pending(i64 index) const override { return row_of_[index] < 0 ? 0 : rows_[row_of_[index]].job; }

  void apply(const Op& op) override {
    const i64 index = sequences_.index(op.a);
    if (op.kind == OpKind::bind) {
      if (op.b <= 0 || op.b >= static_cast<i64>(rows_.size()) || rows_[op.b].index >= 0 || row_of_[index] >= 0) {
        throw SpecError("bind: row " + std::to_string(op.b) + " or the sequence is bound already");
      }
      remove_unbound(op.b);
      rows_[op.b].index = index;
      row_of_[index] = static_cast<i32>(op.b);
      forget_room(op.b);
    } else if (op.kind == OpKind::unbind) {
      if (row_of_[index] < 0 || row_of_[index] != op.b) throw SpecError("unbind: not the row of this sequence");
      rows_[op.b].index = -1;
      row_of_[index] = -1;
      add_unbound(op.b);
    } else {
      throw SpecError("block: the virtual backend has no block table");
    }
  }

  bool is_mapped(i32 arena, i64 slot, i64 count) const override {
    const i64 a = arena - base_arena_, g = group_of(a);
    if (slot == geometry_.groups[g].arena_slots[a - first_[g]] - 1) return count == 1 && scratch_pages_[a] >= 0;
    const Extent& e = extent(slot / row_slots(g, a), a);
    const i64 first = slot % row_slots(g, a);
    bool all = first >= e.lo && first + count <= e.hi;
    for (i64 i = first; all && i < first + count; ++i) all = e.pages[i] >= 0;
    return all;
  }

  void on_map(const Op& op) override { change(op, true); }
  void on_unmap(const Op& op) override { change(op, false); }

  i64 offset_bytes(i64 index, i64 group, i64 a, i64 token) const override {
    return slot_of(row_of_[index], group, first_[group] + a) * page_bytes() +
           token * token_bytes(group, first_[group] + a);
  }

  Placement place(i64 index, i64 group) const override {
    Placement p;
    p.row = std::max(i32{0}, row_of_[index]);
    p.first_block = p.row * (geometry_.groups[group].row_tokens / geometry_.groups[group].block_tokens);
    return p;
  }

  i64 tokens_that_fit(i64 index, i64 group, i64 pages) const override {
    i64 low = sequences_.tokens(index, group), high = geometry_.groups[group].max_tokens;
    while (low < high) {  // the need grows with the tokens
      const i64 middle = (low + high + 1) / 2;
      i64 need = 0;
      for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
        const i64 hi = row_of_[index] < 0 ? 0 : extent(row_of_[index], a).hi;
        need += std::max(i64{0}, high_slot(group, a, middle) - hi);
      }
      if (need <= pages) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  i64 parked_pages() const override {
    i64 pages = 0;
    std::unordered_map<i32, i32> shared;  // page -> how many of its mappings are parked ones
    const auto count = [&](const Row& row, const Extent& e, i64 from, i64 to) {
      if (to <= from) return;
      if (!row.maybe_shared) pages += to - from;
      for (i64 slot = from; row.maybe_shared && slot < to; ++slot) ++shared[e.pages[slot]];
    };
    for (i64 row = 1; row < static_cast<i64>(rows_.size()); ++row) {
      if (rows_[row].slots == 0) continue;
      for (i64 a = 0, g = 0; a < arenas_; ++a) {
        while (a >= first_[g + 1]) ++g;
        const Extent& e = extent(row, a);
        i64 lo, hi;
        needed(row, g, a, &lo, &hi);
        count(rows_[row], e, e.lo, std::min(lo, e.hi));
        count(rows_[row], e, std::max(hi, e.lo), e.hi);
      }
    }
    for (const auto& [page, mappings] : shared) pages += pool_.refs(page) == mappings;
    return pages;
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

  void count_bytes(i64* used_bytes, i64* shared_bytes) const override {
    std::vector<SharedPart> shared;  // in bytes of a page
    *used_bytes = 0;
    for (i64 index = 0; index < sequences_.capacity(); ++index) {
      const i64 row = row_of_[index];
      if (row < 0) continue;
      for (i64 g = 0; g < groups_; ++g) {
        const i64 front = sequences_.front(index, g), tokens = sequences_.tokens(index, g);
        for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
          const i64 from = front * token_bytes(g, a), to = tokens * token_bytes(g, a);
          *used_bytes += to - from;
          if (!rows_[row].maybe_shared) continue;
          const Extent& e = extent(row, a);
          for (i64 slot = from / page_bytes(); slot * page_bytes() < to; ++slot) {
            if (pool_.refs(e.pages[slot]) <= 1) continue;
            const i64 start = slot * page_bytes();
            shared.push_back({e.pages[slot], std::max(from - start, i64{0}), std::min(to - start, page_bytes())});
            *used_bytes -= shared.back().to - shared.back().from;
          }
        }
      }
    }
    const SharedCount count = count_shared(shared);
    *used_bytes += count.length;
    *shared_bytes = count.pieces * page_bytes();
  }

  i64 first_arena(i64 group) const override { return base_arena_ + first_[group]; }

  i64 mapped_extent_slots(i64 group, i64 arena_in_group) const override {
    const i64 a = first_[group] + arena_in_group;
    for (i64 row = static_cast<i64>(rows_.size()) - 1; row >= 0; --row) {
      if (extent(row, a).count > 0) return slot_of(row, group, a) + extent(row, a).hi;
    }
    return 0;
  }

  void check(std::vector<std::string>* out) const override;

 private:
  struct Unbound {
    i64 row, slots;
  };

  i64 page_bytes() const { return geometry_.page_bytes; }
  i32 arena(i64 a) const { return static_cast<i32>(base_arena_ + a); }
  i64 token_bytes(i64 g, i64 a) const { return geometry_.groups[g].token_bytes[a - first_[g]]; }
  i64 row_slots(i64 g, i64 a) const { return geometry_.groups[g].row_slots[a - first_[g]]; }
  i64 slot_of(i64 row, i64 g, i64 a) const { return row * row_slots(g, a); }
  Extent& extent(i64 row, i64 a) { return extents_[row * arenas_ + a]; }
  const Extent& extent(i64 row, i64 a) const { return extents_[row * arenas_ + a]; }

  // With the guard: a kernel that loads whole tiles does so for a padding row too.
  i64 trash_slots(i64 g, i64 a) const {
    const i64 tokens = kTrashBlocks * geometry_.groups[g].block_tokens + geometry_.tail_guard_tokens;
    return std::min(row_slots(g, a), ceil_div(tokens * token_bytes(g, a), page_bytes()));
  }
  i64 low_slot(i64 g, i64 a, i64 first_token) const { return first_token * token_bytes(g, a) / page_bytes(); }
  i64 high_slot(i64 g, i64 a, i64 tokens) const {
    if (tokens == 0) return 0;
    const i64 bytes = (tokens + geometry_.tail_guard_tokens) * token_bytes(g, a);
    return std::min(row_slots(g, a), ceil_div(bytes, page_bytes()));
  }

  // The slots that the row's sequence needs; none for a parked row.
  void needed(i64 row, i64 g, i64 a, i64* lo, i64* hi) const {
    const i64 index = rows_[row].index;
    *lo = index < 0 ? extent(row, a).hi : low_slot(g, a, sequences_.front(index, g));
    *hi = index < 0 ? extent(row, a).hi : high_slot(g, a, sequences_.tokens(index, g));
  }

  // Tokens that need no further mapping. Kept per row; -1 where a mapping has changed since.
  i64 room(i64 row, i64 group) {
    i64& room = room_[row * groups_ + group];
    if (room >= 0) return room;
    const GroupGeometry& g = geometry_.groups[group];
    const i64 front = rows_[row].index < 0 ? 0 : sequences_.front(rows_[row].index, group);
    room = g.max_tokens;
    for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
      const Extent& e = extent(row, a);
      i64 here = e.hi * page_bytes() / token_bytes(group, a) - geometry_.tail_guard_tokens;
      if (e.count == 0 || e.lo > low_slot(group, a, front)) here = 0;
      if (e.count == 0 || e.hi < row_slots(group, a)) room = std::min(room, std::max(i64{0}, here));
    }
    return room;
  }

  void forget_room(i64 row) {
    for (i64 g = 0; g < groups_; ++g) room_[row * groups_ + g] = -1;
  }

  void add_unbound(i64 row) {
    rows_[row].place = static_cast<i64>(unbound_.size());
    unbound_.push_back({row, rows_[row].slots});
  }

  void remove_unbound(i64 row) {
    const i64 place = rows_[row].place;
    unbound_[place] = unbound_.back();
    rows_[unbound_[place].row].place = place;
    unbound_.pop_back();
    rows_[row].place = -1;
  }

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

  i64 group_of(i64 a) const {
    i64 g = 0;
    while (a >= first_[g + 1]) ++g;
    return g;
  }

  void change(const Op& op, bool mapped) {
    const i64 a = op.at - base_arena_;
    const i64 g = group_of(a);
    const GroupGeometry& geometry = geometry_.groups[g];
    if (op.a == geometry.arena_slots[a - first_[g]] - 1) {
      i64& page = scratch_pages_[a];
      if (page != (mapped ? -1 : op.b)) throw SpecError("map: the scratch slot shows page " + std::to_string(page));
      page = mapped ? op.b : -1;
      return;
    }
    const i64 row = op.a / row_slots(g, a), slot = op.a % row_slots(g, a);
    Extent& e = extent(row, a);
    if (slot + op.c > row_slots(g, a)) throw SpecError("map: a run leaves its row");
    for (i64 i = 0; i < op.c; ++i) {
      const i64 now = slot + i < static_cast<i64>(e.pages.size()) ? e.pages[slot + i] : -1;
      if (now != (mapped ? -1 : op.b + i)) {
        throw SpecError(std::string(mapped ? "map" : "unmap") + ": row " + std::to_string(row) + ", slot " +
                        std::to_string(slot + i) + " shows page " + std::to_string(now));
      }
    }
    if (static_cast<i64>(e.pages.size()) < slot + op.c) e.pages.resize(slot + op.c, -1);
    for (i64 i = 0; i < op.c; ++i) e.pages[slot + i] = mapped ? static_cast<i32>(op.b + i) : -1;
    const i64 sign = mapped ? 1 : -1;
    e.count += sign * op.c;
    rows_[row].slots += sign * op.c;
    if (rows_[row].place >= 0) unbound_[rows_[row].place].slots = rows_[row].slots;
    if (e.count == 0) {
      e.lo = e.hi = 0;
    } else if (mapped) {
      e.lo = e.count == op.c ? slot : std::min(e.lo, slot);
      e.hi = std::max(e.hi, slot + op.c);
    } else {
      while (e.pages[e.lo] < 0) ++e.lo;
      while (e.pages[e.hi - 1] < 0) --e.hi;
    }
    room_[row * groups_ + g] = -1;
  }

  const Geometry& geometry_;
  PagePool& pool_;
  const Sequences& sequences_;
  const i64 groups_;
  i64 arenas_ = 0;
  i32 base_arena_ = 0;
  std::vector<i64> first_;  // first arena of each group, and one past the last
  std::vector<Row> rows_;
  std::vector<i32> row_of_;              // by sequence, -1 while it holds nothing
  std::vector<Unbound> unbound_;         // rows without a sequence, mapped (parked) or not
  std::vector<Extent> extents_;          // [row][arena]
  std::vector<i64> room_;                // [row][group]
  std::vector<i64> ready_;               // [row][group]: tokens that need nothing of the row's job, -1: it maps nothing
  std::vector<std::uint8_t> copy_tail_;  // [sequence][group]: look whether the tail page is shared before writing
  std::vector<i64> scratch_pages_;       // by arena, -1 between calls
};

void VirtualTable::check(std::vector<std::string>* out) const {
  std::unordered_map<i32, i32> seen;
  const auto say = [out](i64 row, const std::string& what) {
    out->push_back("row " + std::to_string(row) + ": " + what);
  };
  for (i64 row = 0; row < static_cast<i64>(rows_.size()); ++row) {
    const Row& r = rows_[row];
    i64 slots = 0;
    for (i64 a = 0; a < arenas_; ++a) {
      const Extent& e = extent(row, a);
      slots += e.count;
      if (e.count != e.hi - e.lo) say(row, "a hole in the mapped range of arena " + std::to_string(a));
      for (i64 slot = e.lo; slot < e.hi; ++slot) {
        if (e.pages[slot] >= 0) ++seen[e.pages[slot]];
      }
      if (r.index < 0) continue;
      const i64 g = group_of(a), tokens = sequences_.tokens(r.index, g);
      if (tokens == 0) continue;
      if (e.hi < high_slot(g, a, tokens)) say(row, "the frontier lies before the end of its tokens");
      if (e.lo > low_slot(g, a, sequences_.front(r.index, g))) say(row, "its first tokens are not mapped");
      const i64 tail = tokens * token_bytes(g, a) / page_bytes();
      if (tail < e.hi && e.pages[tail] >= 0 && pool_.refs(e.pages[tail]) > 1 && !copy_tail_[r.index * groups_ + g]) {
        say(row, "the next write would land in a page that another row shows");
      }
    }
    if (slots != r.slots)
      say(row, "counted " + std::to_string(slots) + " mapped slots, noted " + std::to_string(r.slots));
    if (r.index >= 0 && (!sequences_.live(r.index) || row_of_[r.index] != row)) say(row, "bound to no live sequence");
    if ((r.index < 0 && row > 0) != (r.place >= 0)) say(row, "its place among the unbound rows is wrong");
  }
  i64 distinct = 0;
  for (const auto& [page, count] : seen) {
    ++distinct;
    if (pool_.refs(page) != count) {
      out->push_back("invariant 3: page " + std::to_string(page) + " is mapped " + std::to_string(count) +
                     " times, counted " + std::to_string(pool_.refs(page)));
    }
  }
  if (distinct != owned_pages) {
    out->push_back("invariant 1: " + std::to_string(distinct) + " pages are mapped here, counted " +
                   std::to_string(owned_pages));
  }
}

}  // namespace

std::unique_ptr<PageTable> make_virtual_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences) {
  return std::make_unique<VirtualTable>(geometry, pool, sequences);
}

}  // namespace kvmem
