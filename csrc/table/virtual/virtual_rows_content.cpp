// The content of rows: which cached blocks each has, and what live sequences need of them (ops `hold` and `evict`).

#include <algorithm>

#include "table/virtual/virtual_rows.h"

namespace kvmem {

namespace {

i32 window_of(const Op& op) { return static_cast<i32>(op.c >> kWindowShift) - 1; }

}  // namespace

void VirtualRows::on_copy(const Op& op, bool undo) {
  const i32 node = static_cast<i32>(op.a);
  if (!undo) index_.expect_change();
  if (const i32 window = window_of(op); window >= 0) {
    op.kind == OpKind::hold ? attach_part(op.b, index_.ordinal(node), window, op.d, undo)
                            : detach_part(op.b, index_.ordinal(node), window, undo);
  } else if (op.kind == OpKind::hold) {
    attach(op.b, node, (op.c & 1) != 0, op.c >> 1, op.d, undo);
  } else {
    detach(op.b, node, (op.c & 1) != 0, undo);
  }
}

bool VirtualRows::can_evict(const Op& op) const {
  const Row& row = rows_[op.b];
  const i32 node = static_cast<i32>(op.a), window = window_of(op);
  const i64 ordinal = index_.ordinal(node);
  if (window >= 0) {
    const bool there = ordinal < static_cast<i64>(row.holds.size()) && row.holds[ordinal].node == node;
    return there && part(op.b, ordinal, window).present &&
           (index_.needs(node, window) == 0 || is_out_of_window_copy(op.b, ordinal, window));
  }
  const bool last = row.index < 0 && !row.holds.empty() && row.holds.back().node == node;
  for (i32 w = 0; last && w < index_.windows(); ++w) {
    if (part(op.b, ordinal, w).present && index_.needs(node, w) > 0 && index_.window_copies(node, w) == 1) return false;
  }
  return last && (index_.copies(node) > 1 || !index_.used(node));
}

void VirtualRows::attach(i64 row, i32 node, bool state, i64 windows, i64 after, bool undo) {
  Row& r = rows_[row];
  const i64 all_windows = index_.windows();
  KVMEM_ASSERT(index_.ordinal(node) == blocks_of(row), "content is a chain of blocks");
  if (!undo) r.attached_in = pool_.transactions;
  if (static_cast<i64>(holder_.size()) < index_.capacity()) {
    part_row_.resize(index_.capacity() * index_.windows(), -1);
    if (any_state_) state_row_.resize(index_.capacity(), -1);
    holder_.resize(index_.capacity(), -1);  // last: if one of them finds no memory, the next call tries all again
  }
  if (all_windows > 0) r.parts.resize((r.holds.size() + 1) * all_windows);
  const auto ordinal = [&] { return index_.ordinal(node); };  // read only where other rows hold the node
  Hold hold;
  hold.node = node, hold.previous = after == 0 ? -1 : static_cast<i32>(after);
  hold.next = after == 0 ? holder_[node] : rows_[after].holds[ordinal()].next;
  r.holds.push_back(hold);
  (after == 0 ? holder_[node] : rows_[after].holds[ordinal()].next) = static_cast<i32>(row);
  if (hold.next >= 0) rows_[hold.next].holds[ordinal()].previous = static_cast<i32>(row);
  if (hold.next >= 0) update_duplicate(hold.next);
  index_.add_copy(node, -1, undo);
  for (i32 w = 0; w < all_windows; ++w) {
    if (needs_block(row, ordinal(), w)) index_.need(node, w);
    if (windows >> w & 1) attach_part(row, ordinal(), w, 0, undo);
  }
  if (state) {
    r.state = node;
    state_row_[node] = static_cast<i32>(row);
    index_.note_state(node, true, undo);
  }
  if (r.index < 0) update_lists(row);
}

void VirtualRows::detach(i64 row, i32 node, bool state, bool undo) {
  const i64 ordinal = index_.ordinal(node);
  KVMEM_ASSERT(blocks_of(row) == ordinal + 1 && rows_[row].holds.back().node == node, "the last block leaves");
  if (state) {
    rows_[row].state = kNoNode;
    state_row_[node] = -1;
    index_.note_state(node, false, undo);
  }
  for (i32 w = index_.windows(); w-- > 0;) {
    if (part(row, ordinal, w).present) detach_part(row, ordinal, w, undo);
    if (needs_block(row, ordinal, w)) index_.unneed(node, w, undo);
  }
  const Hold hold = rows_[row].holds.back();
  (hold.previous >= 0 ? rows_[hold.previous].holds[ordinal].next : holder_[node]) = hold.next;
  if (hold.next >= 0) rows_[hold.next].holds[ordinal].previous = hold.previous;
  rows_[row].holds.pop_back();
  rows_[row].parts.resize(rows_[row].holds.size() * index_.windows());
  if (hold.previous >= 0) update_duplicate(hold.previous);
  if (hold.next >= 0) update_duplicate(hold.next);
  index_.drop_copy(node, -1, undo);
  if (rows_[row].index < 0) update_lists(row);
}

void VirtualRows::attach_part(i64 row, i64 ordinal, i32 window, i64 after, bool undo) {
  const i32 node = rows_[row].holds[ordinal].node;
  i32& link = after == 0 ? part_row_[node * index_.windows() + window] : mutable_part(after, ordinal, window).next;
  Part& p = mutable_part(row, ordinal, window);
  KVMEM_ASSERT(!p.present, "the part is not present yet");
  p.present = true;
  p.next = link, p.previous = after == 0 ? -1 : static_cast<i32>(after);
  if (p.next >= 0) mutable_part(p.next, ordinal, window).previous = static_cast<i32>(row);
  link = static_cast<i32>(row);
  index_.add_window_copy(node, window, undo);
}

void VirtualRows::detach_part(i64 row, i64 ordinal, i32 window, bool undo) {
  const i32 node = rows_[row].holds[ordinal].node;
  Part& p = mutable_part(row, ordinal, window);
  KVMEM_ASSERT(p.present, "the part is present");
  (p.previous >= 0 ? mutable_part(p.previous, ordinal, window).next : part_row_[node * index_.windows() + window]) =
      p.next;
  if (p.next >= 0) mutable_part(p.next, ordinal, window).previous = p.previous;
  p = Part();
  may_reclaim(row);
  index_.drop_window_copy(node, window, undo);
}

void VirtualRows::need_blocks(i64 row, i32 window, i64 from, i64 to, bool undo) {
  for (i64 k = from; k < to; ++k) index_.need(rows_[row].holds[k].node, window, undo);
}

// The last block first, the order in which a chain is released in other groups.
void VirtualRows::unneed_blocks(i64 row, i32 window, i64 from, i64 to, bool undo) {
  for (i64 k = to; k-- > from;) index_.unneed(rows_[row].holds[k].node, window, undo);
}

void VirtualRows::on_front(i64 index, i64 group, i64 old_first, i64 first, bool undo) {
  const i32 window = index_.window_of(group);
  const i64 row = row_of_[index];
  if (window < 0 || row < 0) return;
  const i64 from = ceil_div(std::min(old_first, first), index_.block_tokens());
  const i64 to = std::min(blocks_of(row), ceil_div(std::max(old_first, first), index_.block_tokens()));
  first > old_first ? unneed_blocks(row, window, from, to, undo) : need_blocks(row, window, from, to, undo);
}

i64 VirtualRows::mapped_parts(i64 row, i64 index, i64 ordinal) const {
  i64 windows = 0;
  for (i32 w = 0; w < index_.windows(); ++w) {
    const bool reached = ordinal >= first_block(index, w);
    windows |= i64{reached && is_mapped_block(row, index_.group_of(w), ordinal)} << w;
  }
  return windows;
}

bool VirtualRows::is_mapped_block(i64 row, i64 g, i64 ordinal) const {
  const i64 size = index_.block_tokens();
  for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
    const Extent& e = extent(row, a);
    const i64 from = quotient(ordinal * size * token_bytes(g, a), page_bytes());
    const i64 to = ceil_div((ordinal + 1) * size * token_bytes(g, a), page_bytes());
    if (from < e.lo || to > e.hi) return false;
    for (i64 slot = from; slot < std::min(to, e.solid); ++slot) {
      if (e.pages[slot] < 0) return false;
    }
  }
  return true;
}

}  // namespace kvmem
