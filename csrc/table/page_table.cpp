#include "table/page_table.h"

namespace kvmem {

void PageTable::on_order(const Op& op, bool undo) {
  const Item x{static_cast<i32>(op.a), static_cast<i32>(op.b)};
  switch (op.kind) {
    case OpKind::aside:
      return index_.skip_item(x);
    case OpKind::back:
      return index_.unskip(x);
    default:
      KVMEM_ASSERT(op.kind == OpKind::keep, "one of the other private kinds");
      index_.note_kept(x.node, op.b, op.c, op.d, undo);
      if (undo) slots_->undo_take({op.c, op.d});
  }
}

void PageTable::use_slots(std::shared_ptr<HostSlots> slots) {
  KVMEM_ASSERT(!slots_, "a table has one set of host slots");
  pool_.set_host(this, slots->memory()->data(), slots->memory()->bytes());
  slots_ = std::move(slots);
}

i64 PageTable::slot_bytes(i64 group) const {
  i64 bytes = 0;
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) bytes += slot_tokens(group) * token_bytes(group, a);
  return bytes;
}

// A window's part and a snapshot can be used without those of the blocks before.
SlotContent PageTable::content_of(i32 node, i64 group) const {
  const i32 window = index_.window_of(group), parent = index_.parent(node);
  const bool follows = window < 0 && !has_state(group) && !index_.is_root(parent);
  return {index_.key(node), follows ? index_.key(parent) : 0, index_.priority({node, window})};
}

void PageTable::keep(i32 node, i64 group, Transaction& tx) {
  if (keeps_in_ != pool_.transactions) slots_->confirm_takes();
  keeps_in_ = pool_.transactions;
  for (i64 g = 0; g < groups_; ++g) {
    if ((group >= 0 && g != group) || slots_->count(g) == 0 || !has(node, g)) continue;
    index_.expect_change();
    const SlotName name = slots_->take(g, content_of(node, g));
    if (name.slot < 0) continue;  // all slots are in use by transfers
    try {
      tx.push({OpKind::keep, number, node, g, name.slot, name.generation});
    } catch (...) {
      slots_->undo_take(name);
      throw;
    }
    store(node, g, slots_->offset(name.slot), tx);
  }
}

void PageTable::evict_all(Transaction& tx) {
  evict_truncated_ends(tx);
  evict_in_order(
      tx, [] { return true; },
      [&](Item x) {
        evict_item(x, tx);
        return Outcome::evicted;
      });
}

i64 PageTable::reclaim(i64 pages, bool content, Transaction& tx) {
  i64 freed = 0;
  for (const Reclaim kind : kReclaimOrder) {
    if (freed < pages && (content || kind == Reclaim::idle)) freed += reclaim_kind(kind, pages - freed, tx);
  }
  return finish_reclaim(pages, freed, tx);
}

}  // namespace kvmem
