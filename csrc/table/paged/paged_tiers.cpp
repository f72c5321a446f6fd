// Between blocks of the device and host slots.

#include "table/paged/paged_table.h"

namespace kvmem {

void PagedTable::move_part(OpKind kind, i64 g, i64 part, i64 block, i64 at, Transaction& tx) {
  const Blocks& b = blocks_[g];
  for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
    const i64 bytes = b.tokens * token_bytes(g, a);
    tx.push({kind, arena(a), block * bytes, at + part * bytes, bytes});
    at += slot_tokens(g) * token_bytes(g, a);
  }
}

void PagedTable::store(i32 node, i64 group, i64 at, Transaction& tx) {
  for (i64 part = 0; part < blocks_[group].parts; ++part) {
    move_part(OpKind::store, group, part, blocks_.block_of(node, group, part), at, tx);
  }
  // The device still copies from the blocks. Without streams it does not, and stores of neighbours become one copy.
  if (pool_.has_streams()) blocks_.set_fence(group, tx.new_fence());
}

void PagedTable::promote(const std::vector<i32>& chain, const SlotsOfChain& from, Transaction& tx) {
  for (std::size_t k = 0; k < chain.size(); ++k) {
    for (i64 g = 0; g < groups_; ++g) {
      const i64 slot = from.at(static_cast<i64>(k), g), parts = blocks_[g].parts;
      if (slot < 0 || blocks_.block_of(chain[k], g) != 0) continue;
      for (i64 part = 0; part < parts; ++part) {
        const i64 fresh = next_block(g, parts * static_cast<i64>(chain.size() - k) - part, tx);
        move_part(OpKind::load, g, part, fresh, slots()->offset(slot), tx);
        tx.push({OpKind::hold, number, chain[k], g, fresh, part});
      }
      if (has_state(g)) blocks_.list_snapshot(g, blocks_.block_of(chain[k], g));
    }
  }
  tx.new_fence();  // until it has passed, the device reads the slots
}

}  // namespace kvmem
