#include "table/page_table.h"

namespace kvmem {

void PageTable::on_content(const Op& op, bool undo) {
  const Item x{static_cast<i32>(op.a), static_cast<i32>(op.b)};
  switch (op.kind) {
    case OpKind::aside:
      return index_.skip_item(x);
    case OpKind::back:
      return index_.unskip(x);
    case OpKind::demote:
      return on_demote(op, undo);
    default:
      return on_copy(op, undo);
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

// Nothing could find the continuations of a node without it. A node of which windows have no copy may have
// continuations with copies, so it is visited too, and it stays among its siblings until the transaction ends.
void PageTable::evict_subtree(i32 node, Transaction& tx) {
  const auto last_below = [this](i32 x) {
    for (i32 child; (child = index_.unused_child(x)) != kNoNode;) x = child;
    return x;
  };
  for (i32 x = last_below(node);;) {
    const i32 parent = index_.parent(x), sibling = x == node ? kNoNode : index_.unused_sibling(x);
    for (i32 window = -1; index_.skipped_count() > 0 && window < index_.windows(); ++window) {
      unskip_item({x, window}, tx);
    }
    evict(x, tx);
    if (x == node) return;
    x = sibling == kNoNode ? parent : last_below(sibling);
  }
}

void PageTable::evict_item(Item x, Transaction& tx) {
  if (x.window < 0) return evict_subtree(x.node, tx);
  unskip_item(x, tx);
  evict_window(x.node, x.window, tx);
}

}  // namespace kvmem
