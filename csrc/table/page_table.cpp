#include "page_table.h"

namespace kvmem {

// Windows may have nothing of a block while they have something of those behind it, so it is passed, not skipped; and
// it stays among its siblings until the transaction ends.
void PageTable::forget(i32 node, Transaction& tx) {
  const auto last_below = [this](i32 x) {
    for (i32 child; (child = index_.unused_child(x)) != kNoNode;) x = child;
    return x;
  };
  for (i32 x = last_below(node);;) {
    const i32 parent = index_.parent(x), sibling = x == node ? kNoNode : index_.unused_sibling(x);
    for (i32 window = -1; index_.asides() > 0 && window < index_.windows(); ++window) name_again({x, window}, tx);
    evict(x, tx);
    if (x == node) return;
    x = sibling == kNoNode ? parent : last_below(sibling);
  }
}

}  // namespace kvmem
