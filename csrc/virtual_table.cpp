// The virtual backend (vAttention's idea): each sequence owns a row, a contiguous range of addresses in every arena of
// every group, and pages are mapped under it as it grows.
//
// A row keeps its mappings when its sequence ends (it is parked), and the next sequence that fits takes it over with no
// driver call. If what it holds is known, it is kept for a sequence that begins alike as long as memory and rows last.
// The page is the unit of sharing: share_row() maps the same page under two rows. Slots [lo, hi) of a row are
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
    share_row(row_of_[parent], row_of_[child], group, first, tokens, tx);
  }

  // The last block first: a row holds all blocks before the ones it holds. Of the rows that hold it, one that is parked
  // and ends there can be taken as it is.
  Found find(const std::vector<i32>& chain, i64 tokens) const override {
    for (i64 k = static_cast<i64>(chain.size()); k > 0; --k) {
      Found found;
      found.tokens = std::min(tokens, k * index_.block_tokens());
      i64 looked = 0;
      for (i64 row = first_holder(chain[k - 1]); row >= 0 && looked < PrefixIndex::kCandidates; ++looked) {
        const bool best = rows_[row].index < 0 && static_cast<i64>(rows_[row].holds.size()) == k;
        if ((found.row < 0 || best) && shows(row, chain[k - 1], found.tokens)) found.row = row;
        if (found.row == row && best) break;
        row = rows_[row].holds[k - 1].next;
      }
      if (found.row >= 0) return found;
    }
    return Found();
  }

  void adopt(i64 index, const std::vector<i32>& chain, const Found& found, Transaction& tx) override {
    const i64 whole = found.tokens / index_.block_tokens();
    Guard guard(source_, found.row);
    const bool taken = can_take_over(found.row, whole);
    if (taken) {
      take_over(index, found.row, whole, tx);
    } else {
      bind_empty(index, tx);
      for (i64 g = 0; g < groups_; ++g) {
        if (geometry_.groups[g].growth != Growth::token) continue;
        share_row(found.row, row_of_[index], g, sequences_.front(index, g), found.tokens, tx);
      }
      hold_all(row_of_[index], chain, whole, false, tx);
    }
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth == Growth::token) grow(index, g, found.tokens, found.tokens, tx);
      if (geometry_.groups[g].growth != Growth::fixed) continue;
      grow(index, g, 0, 1, tx);
      copy_state(found.row, row_of_[index], g, tx);
    }
    // Only now: what lies behind the content may have been another row's too.
    if (taken && geometry_.zero == Zero::always) zero_row(found.row, found.tokens, tx);
  }

  bool has(i32 node, i64) const override { return first_holder(node) >= 0; }

  void publish(i64 index, i64, i32 node, Transaction& tx) override {
    tx.push({OpKind::hold, arena(0), node, row_of_[index]});
  }

  void retract(i64 index, i32 node, Transaction& tx) override {
    tx.push({OpKind::evict, arena(0), node, row_of_[index]});
  }

  void evict(i32 node, Transaction& tx) override {
    while (holder_[node] >= 0) cut(holder_[node], index_.ordinal(node), tx);
  }

  // A row of its own shows the same pages and has a copy of the state. It belongs to no sequence.
  void snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) override {
    for (i64 row = holder_[chain.back()]; row >= 0; row = rows_[row].holds[chain.size() - 1].next) {
      if (rows_[row].state == chain.back()) return;
    }
    const i64 from = row_of_[index];
    Guard guard(source_, from);
    const i64 to = pick_empty(tx);
    Guard second(copy_, to);
    drop_pages(to, tx);
    const i64 tokens = static_cast<i64>(chain.size()) * index_.block_tokens();
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth == Growth::token) {
        share_row(from, to, g, sequences_.front(index, g), tokens, tx);
      } else {
        for (i64 a = first_[g]; a < first_[g + 1]; ++a) map(to, a, 0, high_slot(g, a, 1), tx);
        copy_state(from, to, g, tx);
      }
    }
    rows_[to].fence = tx.new_fence();
    hold_all(to, chain, static_cast<i64>(chain.size()), true, tx);
  }

  std::vector<i64> shared_pieces(i64 index, i64 group, i64 token) const override {
    std::vector<i64> pieces;
    for (i64 a = first_[group]; row_of_[index] >= 0 && a < first_[group + 1]; ++a) {
      const Extent& e = extent(row_of_[index], a);
      const i64 slot = token * token_bytes(group, a) / page_bytes();
      const bool shared = slot >= e.lo && slot < e.hi && pool_.refs(e.pages[slot]) > 1;
      pieces.push_back(shared ? e.pages[slot] : -1);
    }
    return pieces;
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

  // What nobody needs in parked rows first, the one that was freed longest ago leading: its fence has most likely
  // passed. Then what live rows hold beyond their need, then second copies of cached blocks, then cached blocks.
  i64 spill(i64 pages, Transaction& tx) override {
    std::vector<i64> order;
    for (const auto& entry : unbound_) {
      if (entry.slots > 0 && entry.row != copy_) order.push_back(entry.row);
    }
    std::sort(order.begin(), order.end(), [this](i64 x, i64 y) {
      return rows_[x].fence != rows_[y].fence ? rows_[x].fence < rows_[y].fence : x < y;
    });
    const std::size_t parked = order.size();
    for (i64 row : row_of_) {
      if (row > 0) order.push_back(row);
    }
    i64 freed = 0;
    for (std::size_t i = 0; i < order.size() && freed < pages; ++i) freed += spill_row(order[i], pages - freed, tx);
    for (std::size_t i = 0; i < parked && freed < pages; ++i) {
      if (!is_copy(order[i])) continue;
      cut(order[i], 0, tx);
      freed += spill_row(order[i], pages - freed, tx);
    }
    for (i32 node; freed < pages && (node = index_.victim()) != kNoNode;) freed += give_up(node, pages - freed, tx);
    for (std::size_t i = 0; i < parked && freed < pages; ++i) {
      if (!is_spare_snapshot(order[i])) continue;
      cut(order[i], 0, tx);
      freed += spill_row(order[i], pages - freed, tx);
    }
    return freed;
  }

 private:
  // Marks a row that a decision reads or fills while it looks for memory, and that must not lose any to it.
  class Guard {
   public:
    Guard(i64& place, i64 row) : place_(place) { place_ = row; }
    ~Guard() { place_ = -1; }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    i64& place_;
  };

  // True if the row has what each group needs of the first `tokens` tokens of its content.
  bool shows(i64 row, i32 node, i64 tokens) const {
    for (const GroupGeometry& group : geometry_.groups) {
      const bool state = rows_[row].state == node && tokens % index_.block_tokens() == 0;
      if (group.growth == Growth::fixed && !state) return false;
    }
    return has_mapped(row, tokens);
  }

  bool has_mapped(i64 row, i64 tokens) const {
    for (i64 a = 0, g = 0; a < arenas_; ++a) {
      while (a >= first_[g + 1]) ++g;
      const GroupGeometry& group = geometry_.groups[g];
      if (group.growth != Growth::token) continue;
      const i64 first = window_first(group, geometry_.tail_guard_tokens, tokens);
      const Extent& e = extent(row, a);
      if (e.lo > low_slot(g, a, first) || e.hi < ceil_div(tokens * token_bytes(g, a), page_bytes())) return false;
    }
    return true;
  }

  // True if every block of a parked row from `from` on is held by another row too.
  bool is_covered(i64 row, std::size_t from) const {
    const std::vector<Hold>& holds = rows_[row].holds;
    return holds.size() <= from || index_.places(holds.back().node) > 1;
  }

  i64 spill_row(i64 row, i64 pages, Transaction& tx) {
    i64 freed = 0;
    const bool parked = rows_[row].index < 0;
    const bool fronts = row != source_ && !holds_pins(row);
    for (i64 a = 0, g = 0; a < arenas_ && freed < pages; ++a) {
      while (a >= first_[g + 1]) ++g;
      const Extent& e = extent(row, a);
      i64 lo, hi;
      if (parked) {
        kept(row, g, a, &lo, &hi);
      } else {
        needed(row, g, a, &lo, &hi);
      }
      const i64 before = owned_pages;
      if (fronts && e.lo < std::min(lo, e.hi)) unmap(row, a, e.lo, std::min(lo, e.hi), rows_[row].fence, tx);
      const i64 top = std::max(hi, e.lo);
      if (top < e.hi) {
        const i64 keep = rows_[row].maybe_shared ? 0 : std::max(i64{0}, (e.hi - top) - (pages - freed));
        unmap(row, a, top + keep, e.hi, rows_[row].fence, tx);
      }
      freed += before - owned_pages;
    }
    return freed;
  }

  // A pinned prefix keeps what its windows need, so the fronts of such a row stay.
  bool holds_pins(i64 row) const {
    if (index_.pinned_count() == 0) return false;
    const std::vector<Hold>& holds = rows_[row].holds;
    return std::any_of(holds.begin(), holds.end(), [this](const Hold& h) { return index_.pinned(h.node); });
  }

  i64 give_up(i32 node, i64 pages, Transaction& tx) {
    std::vector<i64> rows;
    for (i64 row = holder_[node]; row >= 0; row = rows_[row].holds[index_.ordinal(node)].next) rows.push_back(row);
    forget(node, tx);
    i64 freed = 0;
    for (i64 row : rows) {
      // What is left may be another row's too; or end where nobody could begin, since a window has passed there.
      if (can_lose(row) && (is_copy(row) || !has_mapped(row, content_tokens(row)))) cut(row, 0, tx);
      if (freed < pages) freed += spill_row(row, pages - freed, tx);
    }
    return freed;
  }

  // The row forgets its content from block `from` on.
  void cut(i64 row, i64 from, Transaction& tx) {
    const Row& r = rows_[row];
    while (static_cast<i64>(r.holds.size()) > from) {
      const i32 node = r.holds.back().node;
      tx.push({OpKind::evict, arena(0), node, row, r.state == node});
    }
  }

  void hold_all(i64 row, const std::vector<i32>& chain, i64 count, bool state, Transaction& tx) {
    for (i64 k = 0; k < count; ++k) tx.push({OpKind::hold, arena(0), chain[k], row, state && k + 1 == count});
  }

  // A parked row whose content other rows hold too.
  bool is_copy(i64 row) const {
    const Row& r = rows_[row];
    return row != source_ && !r.holds.empty() && r.state != r.holds.back().node && is_covered(row, 0);
  }

  // A snapshot whose tokens are in use, so that nothing but the state would be lost: the last to go.
  bool is_spare_snapshot(i64 row) const {
    const Row& r = rows_[row];
    return !r.holds.empty() && r.state == r.holds.back().node && !index_.pinned(r.state) && can_lose(row);
  }

  // True if a parked row can lose what it holds: nobody uses it, or another row holds it too.
  bool can_lose(i64 row) const {
    const std::vector<Hold>& holds = rows_[row].holds;
    return row != source_ && row != copy_ && std::all_of(holds.begin(), holds.end(), [this](const Hold& h) {
             return index_.places(h.node) > 1 || !index_.used(h.node);
           });
  }

  // The smallest parked row without content that has enough mapped, else the largest; among equals the first, so that
  // sequences that start together lie at equal distances and a batch of them is one strided tensor. -1 if all hold
  // content. The trash row is never among them.
  i64 best_empty(i64 slots) const {
    const Unbound* best = nullptr;
    for (const Unbound& u : unbound_) {
      if (!rows_[u.row].holds.empty() || u.row == copy_) continue;
      const bool fits = u.slots >= slots, best_fits = best && best->slots >= slots;
      if (!best || (fits && !best_fits)) {
        best = &u;
      } else if (fits == best_fits) {
        const i64 better = fits ? best->slots - u.slots : u.slots - best->slots;
        if (better > 0 || (better == 0 && u.row < best->row)) best = &u;
      }
    }
    return best ? best->row : -1;
  }

  // A row without content, and one that has as few pages as may be: for one that is to show pages of another.
  i64 pick_empty(Transaction& tx) {
    const Unbound* best = nullptr;
    for (const Unbound& u : unbound_) {
      if (!rows_[u.row].holds.empty() || u.row == copy_) continue;
      if (!best || u.slots < best->slots || (u.slots == best->slots && u.row < best->row)) best = &u;
    }
    return best ? best->row : empty_a_row(tx);
  }

  // A parked row that gives up its content for the next one: a second copy, else the one with the least valuable block.
  i64 empty_a_row(Transaction& tx) {
    for (const Unbound& u : unbound_) {
      if (!is_copy(u.row)) continue;
      const i64 row = u.row;
      cut(row, 0, tx);
      return row;
    }
    for (i32 node; (node = index_.victim()) != kNoNode;) {
      const i64 row = holder_[node];
      if (can_lose(row)) {
        cut(row, 0, tx);
        return row;
      }
      forget(node, tx);
    }
    for (const Unbound& u : unbound_) {
      if (!is_spare_snapshot(u.row)) continue;
      const i64 row = u.row;
      cut(row, 0, tx);
      return row;
    }
    throw OutOfMemory("all rows are in use or hold pinned tokens");
  }

  // The row for a sequence that starts with `tokens` tokens of its own. Where memory is short, a parked row of about
  // that size that would have to give up its pages anyway is taken with them, which costs no driver call.
  i64 pick_row(i64 tokens, Transaction& tx) {
    i64 need = 0;
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth != Growth::token) continue;
      for (i64 a = first_[g]; a < first_[g + 1]; ++a) need += high_slot(g, a, tokens);
    }
    const i64 empty = best_empty(need);
    if (empty < 0) return empty_a_row(tx);
    if (need - rows_[empty].slots <= std::min(pool_.room_pages(), limit_pages - owned_pages)) return empty;
    const i32 node = index_.victim();
    const i64 row = node == kNoNode ? -1 : first_holder(node);
    if (row < 0 || !can_lose(row) || rows_[row].slots > 2 * need) return empty;
    cut(row, 0, tx);
    return row;
  }

  void bind(i64 index, i64 tokens, Transaction& tx) {
    const i64 row = pick_row(tokens, tx);
    tx.push({OpKind::bind, 0, sequences_.handle_of(index), row});
    if (rows_[row].maybe_shared) drop_shared(row, tx);
    if (geometry_.zero == Zero::always) zero_row(row, 0, tx);
  }

  // A parked row can go on as the sequence's own if it loses nothing by that which others cannot show, or if there is
  // no other row. A fixed state could not be found again once it is written over.
  bool can_take_over(i64 row, std::size_t blocks) const {
    if (rows_[row].index >= 0) return false;
    for (const GroupGeometry& group : geometry_.groups) {
      if (group.growth == Growth::fixed) return false;
    }
    return is_covered(row, blocks) || best_empty(0) < 0;
  }

  void take_over(i64 index, i64 row, i64 blocks, Transaction& tx) {
    cut(row, blocks, tx);
    tx.push({OpKind::bind, 0, sequences_.handle_of(index), row});
    for (i64 g = 0; g < groups_; ++g) copy_tail_[index * groups_ + g] = 1;  // the next write may meet a shared page
  }

  // What the last tenant left behind the first `tokens` tokens, and whatever it had mapped beyond its own.
  void zero_row(i64 row, i64 tokens, Transaction& tx) {
    for (i64 a = 0; a < arenas_; ++a) {
      const Extent& e = extent(row, a);
      const i64 base = slot_of(row, group_of(a), a) * page_bytes();
      const i64 from = std::max(e.lo * page_bytes(), tokens * token_bytes(group_of(a), a));
      if (from < e.hi * page_bytes()) tx.push({OpKind::zero, arena(a), base + from, e.hi * page_bytes() - from});
    }
  }

  // For a row that starts with pages of another one: whatever is parked in it would be in the way.
  void bind_empty(i64 index, Transaction& tx) {
    const i64 row = pick_empty(tx);
    tx.push({OpKind::bind, 0, sequences_.handle_of(index), row});
    drop_pages(row, tx);
  }

  void drop_pages(i64 row, Transaction& tx) {
    for (i64 a = 0; a < arenas_; ++a) {
      const Extent& e = extent(row, a);
      if (e.count > 0) unmap(row, a, e.lo, e.hi, rows_[row].fence, tx);
    }
  }

  // Shows the pages that lie whole within tokens [first, tokens) in another row too, and copies what is cut.
  void share_row(i64 from, i64 to, i64 group, i64 first, i64 tokens, Transaction& tx) {
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

  void copy_state(i64 from, i64 to, i64 group, Transaction& tx) {
    for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
      tx.push({OpKind::copy, arena(a), slot_of(to, group, a) * page_bytes(), slot_of(from, group, a) * page_bytes(),
               token_bytes(group, a)});
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

  i64 source_ = -1;  // the row that content is taken from, while it is
  i64 copy_ = -1;    // the row of no sequence that a snapshot is being made in
};

}  // namespace

std::unique_ptr<PageTable> make_virtual_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences,
                                              PrefixIndex& index) {
  return std::make_unique<VirtualTable>(geometry, pool, sequences, index);
}

}  // namespace kvmem
