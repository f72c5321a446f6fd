// What is held back from the eviction order: retention, items that are set aside, pins.

#include "index/prefix_index.h"

namespace kvmem {

void PrefixIndex::start_retention() {
  auto retention = std::make_unique<RetentionPolicy>(nullptr);
  retention->reserve(capacity() * items_);  // the only allocation, before anything changes
  retention->wrap(std::move(policy_));
  retention_ = retention.get();
  policy_ = std::move(retention);
  for (i32 x = 0; x < capacity(); ++x) {
    if (whole_ && nodes_[x].copies > 0) retention_->follow(item(x), nodes_[x].released);
    for (i32 w = 0; w < windows_; ++w) {
      if (has_window(x, w)) retention_->follow(item(x, w), needs(x, w) == 0);
    }
  }
  for (i32 x = 0; whole_ && x < capacity(); ++x) {
    const i32 parent = nodes_[x].parent;
    if (nodes_[x].copies > 0 && !is_root(parent)) retention_->lead(item(parent), item(x));
  }
}

void PrefixIndex::retain(i32 node, int priority, double seconds) {
  KVMEM_ASSERT(retention_, "expect_retention() came first");
  const Node& n = nodes_[node];
  const bool whole = whole_ && n.copies > 0;
  if (whole) retention_->retain(item(node), priority, seconds);
  for (i32 w = 0; w < windows_; ++w) {
    if (has_window(node, w)) retention_->retain(item(node, w), priority, seconds);
  }
}

void PrefixIndex::skip_item(Item x) {
  KVMEM_ASSERT(!is_skipped(x), "an item is set aside once");
  if (x.window < 0) {
    nodes_[x.node].aside = true;
  } else {
    part(x.node, x.window).aside = true;
  }
  ++skipped_;
  policy_->use(id_of(x));
}

void PrefixIndex::unskip(Item x) {
  KVMEM_ASSERT(is_skipped(x), "the item is set aside");
  if (x.window < 0) {
    nodes_[x.node].aside = false;
  } else {
    part(x.node, x.window).aside = false;
  }
  --skipped_;
  policy_->undo_use(id_of(x));
}

void PrefixIndex::pin(i32 node) {
  ++pins_[node];
  ++pinned_;
  nodes_[node].pinned = true;
  acquire(node);
}

void PrefixIndex::unpin(i32 node) {
  KVMEM_ASSERT(nodes_[node].pinned, "the node is pinned");
  count_unpinned(node);
  drop(node);
}

void PrefixIndex::count_unpinned(i32 node) {
  const auto pins = pins_.find(node);
  if (--pins->second == 0) {
    pins_.erase(pins);
    nodes_[node].pinned = false;
  }
  --pinned_;
}

// Undoes the pin nearest to the root first, since it was made last. Each is searched for from `last` again, because
// there may be no memory for a list.
void PrefixIndex::undo_pins(i32 last, i32 end) {
  while (end != last) {
    i32 node = last;
    while (parent(node) != end) node = parent(node);
    count_unpinned(node);
    undo_acquire(node);
    end = node;
  }
}

}  // namespace kvmem
