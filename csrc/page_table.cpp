#include "page_table.h"

namespace kvmem {

void PageTable::forget(i32 node, Transaction& tx) {
  for (i32 x = node;;) {
    for (i32 child; (child = index_.unused_child(x)) != kNoNode;) x = child;
    const i32 parent = index_.parent(x);
    for (i32 window = -1; index_.asides() > 0 && window < index_.windows(); ++window) name_again({x, window}, tx);
    evict(x, tx);
    if (x == node) return;
    x = parent;
  }
}

}  // namespace kvmem
