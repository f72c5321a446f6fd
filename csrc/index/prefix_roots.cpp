// Roots: the node that each (salt, adapter) has, and its key for as long as an event that names it waits.

#include "index/prefix_index.h"

namespace kvmem {

i32 PrefixIndex::open_root(const PrefixKey& key, bool* made) {
  i32 root = find_root(key);
  *made = root == kNoNode;
  if (*made) {
    std::string name = flat(key);
    const std::uint64_t hash = root_hash(key);
    if (free_ == kNoNode) grow_nodes();
    const i32 number = roots_seen_;
    root_keys_.emplace(number, RootKey{{key.salt, key.extra_key, {}}, name});
    try {
      roots_.emplace(std::move(name), free_);
    } catch (...) {
      root_keys_.erase(number);
      throw;
    }
    ++roots_seen_;
    root = new_node();
    nodes_[root].next_child = number;
    nodes_[root].key = hash;
    if (watched_) root_of_[root] = number;
  }
  ++nodes_[root].users;
  return root;
}

void PrefixIndex::unopen_root(i32 root, bool made) {
  KVMEM_ASSERT(is_root(root) && nodes_[root].users > 0, "a root in use");
  --nodes_[root].users;
  if (!made) return;
  const auto key = root_keys_.find(nodes_[root].next_child);
  roots_.erase(key->second.flat);
  root_keys_.erase(key);
  --roots_seen_;
  free_node(root);
}

// Notes that the latest records name this root.
void PrefixIndex::note_root(i32 number) {
  if (recent_number_ != number) recent_root_ = &root_keys_.find(number)->second, recent_number_ = number;
  recent_root_->last_event = events_.serial(), recent_root_->last_move = moves_.serial();
}

void PrefixIndex::drop_root(i32 number) {
  const auto root = root_keys_.find(number);
  roots_.erase(root->second.flat);
  prune_roots();
  if (is_waiting(root->second)) {
    gone_roots_.push_back(number);
  } else {
    if (recent_number_ == number) recent_number_ = -1;
    root_keys_.erase(root);
  }
}

void PrefixIndex::prune_roots() {
  while (!gone_roots_.empty()) {
    const auto root = root_keys_.find(gone_roots_.front());
    if (is_waiting(root->second)) return;
    if (recent_number_ == root->first) recent_number_ = -1;
    root_keys_.erase(root);
    gone_roots_.pop_front();
  }
}

}  // namespace kvmem
