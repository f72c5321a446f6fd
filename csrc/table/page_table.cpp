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
      return on_demote(op, undo);
  }
}

void PageTable::on_demote(const Op& op, bool undo) {
  const i32 node = static_cast<i32>(op.a);
  for (i64 g = 0; g < groups_; ++g) {
    if ((op.b >= 0 && g != op.b) || !has(node, g)) continue;
    if (undo) {
      KVMEM_ASSERT(!lost_.empty(), "the op added an entry");
      lost_.pop_back();
      continue;
    }
    lost_.push_back({g, index_.ordinal(node), std::vector<i32>(index_.block_tokens())});
    index_.copy_tokens(node, index_.block_tokens(), lost_.back().tokens.data());
  }
}

i64 PageTable::reclaim(i64 pages, bool content, Transaction& tx) {
  i64 freed = 0;
  for (const Reclaim kind : kReclaimOrder) {
    if (freed < pages && (content || kind == Reclaim::idle)) freed += reclaim_kind(kind, pages - freed, tx);
  }
  return finish_reclaim(pages, freed, tx);
}

}  // namespace kvmem
