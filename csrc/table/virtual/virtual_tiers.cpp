// Between rows of the device and host slots.

#include <algorithm>

#include "table/virtual/virtual_table.h"

namespace kvmem {

void VirtualTable::move_block(OpKind kind, i64 row, i64 group, i64 ordinal, i64 at, Transaction& tx) {
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    const i64 bytes = slot_tokens(group) * token_bytes(group, a);
    tx.push({kind, arena(a), rows_.slot_of(row, group, a) * page_bytes() + ordinal * bytes, at, bytes});
    at += bytes;
  }
}

void VirtualTable::store(i32 node, i64 group, i64 at, Transaction& tx) {
  const i32 window = index_.window_of(group);
  const i64 row = has_state(group) ? rows_.snapshot_row(node)
                  : window >= 0    ? rows_.first_part_row(node, window)
                                   : rows_.first_holder(node);
  KVMEM_ASSERT(row >= 0, "the group has the node");
  move_block(OpKind::store, row, group, has_state(group) ? 0 : index_.ordinal(node), at, tx);
  // The device still copies from it. Without streams it does not, and stores of neighbours become one copy.
  if (pool_.has_streams()) rows_.set_fence(row, tx.new_fence());
}

// The blocks become the content of one parked row, so that a sequence can take it as it is. What the device has of
// them is shared page by page, as in snapshot().
void VirtualTable::promote(const std::vector<i32>& chain, const SlotsOfChain& from, Transaction& tx) {
  Sources sources(rows_);
  for (const i32 node : chain) {
    if (rows_.first_holder(node) >= 0) sources.add(rows_.first_holder(node));
    for (i32 w = 0; w < index_.windows(); ++w) {
      if (rows_.first_part_row(node, w) >= 0) sources.add(rows_.first_part_row(node, w));
    }
  }
  const i64 row = pick_empty(tx);
  const Guard second(filled_row_, row);
  unmap_row(row, tx);
  const i64 last = static_cast<i64>(chain.size()) - 1;
  i64 state = -1;
  for (i64 g = 0; g < groups_; ++g) {
    if (has_state(g)) {
      state = from.at(last, g);
      fill_state(row, g, state, tx);
    } else if (index_.window_of(g) >= 0) {
      fill_window(row, g, chain, from, tx);
    } else if (geometry_.groups[g].growth == Growth::token) {
      fill_full(row, g, chain, from, tx);
    }
  }
  const i64 fence = tx.new_fence();
  rows_.set_fence(row, fence);
  for (const i64 source : sources.rows()) rows_.set_fence(source, fence);  // the device still copies from it
  for (i64 k = 0; k <= last; ++k) {
    i64 windows = 0;
    for (i32 w = 0; w < index_.windows(); ++w) {
      const i64 g = index_.group_of(w);
      const bool has = from.at(k, g) >= 0 || rows_.first_part_row(chain[k], w) >= 0;
      if (has && k >= first_needed(w, (last + 1) * index_.block_tokens())) windows |= i64{1} << w;
    }
    tx.expect();
    index_.expect_copies();
    const bool snapshot = state >= 0 && k == last;
    rows_.attach(row, chain[k], snapshot, windows, 0, false);
    tx.note({OpKind::hold, number, chain[k], row, i64{snapshot} | windows << 1});
  }
}

void VirtualTable::fill_full(i64 row, i64 group, const std::vector<i32>& chain, const SlotsOfChain& from,
                             Transaction& tx) {
  const i64 size = index_.block_tokens(), blocks = static_cast<i64>(chain.size());
  i64 shared = 0;  // a row that holds a block holds all blocks before it
  while (shared < blocks && rows_.first_holder(chain[shared]) >= 0) ++shared;
  if (shared > 0) share_row(rows_.first_holder(chain[shared - 1]), row, group, 0, shared * size, tx);
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    map_holes(row, a, 0, rows_.high_slot(group, a, blocks * size), tx);
  }
  for (i64 k = shared; k < blocks; ++k) {
    move_block(OpKind::load, row, group, k, slots()->offset(from.at(k, group)), tx);
  }
}

void VirtualTable::fill_window(i64 row, i64 group, const std::vector<i32>& chain, const SlotsOfChain& from,
                               Transaction& tx) {
  const i64 size = index_.block_tokens(), blocks = static_cast<i64>(chain.size());
  const i32 window = index_.window_of(group);
  const i64 first = first_needed(window, blocks * size);
  for (i64 a = first_[group]; a < first_[group + 1] && first < blocks; ++a) {
    map_holes(row, a, rows_.low_slot(group, a, first * size), rows_.high_slot(group, a, blocks * size), tx);
  }
  for (i64 k = first; k < blocks; ++k) {
    const i64 slot = from.at(k, group), other = rows_.first_part_row(chain[k], window);
    if (slot >= 0) {
      move_block(OpKind::load, row, group, k, slots()->offset(slot), tx);
      continue;
    }
    for (i64 a = first_[group]; other >= 0 && a < first_[group + 1]; ++a) {
      const i64 bytes = size * token_bytes(group, a);
      const auto at = [&](i64 r) { return rows_.slot_of(r, group, a) * page_bytes() + k * bytes; };
      tx.push({OpKind::copy, arena(a), at(row), at(other), bytes});
    }
  }
}

void VirtualTable::fill_state(i64 row, i64 group, i64 slot, Transaction& tx) {
  if (slot < 0) return;
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) map(row, a, 0, rows_.high_slot(group, a, 1), tx);
  move_block(OpKind::load, row, group, 0, slots()->offset(slot), tx);
}

}  // namespace kvmem
