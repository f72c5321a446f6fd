#include "index/prefix_index.h"

#include <algorithm>
#include <random>

namespace kvmem {
namespace {

std::uint64_t secret() {
  std::random_device device;
  return std::uint64_t{device()} << 32 | device();
}

constexpr i64 kGhosts = 1 << 14;
// The tables are sized for the nodes that there is memory for, and some more: roots, and nodes without copies on a
// path.
constexpr i64 kFirstNodes = 1 << 8, kMostAtOnce = 1 << 16, kSpareShare = 64;
constexpr i64 kFirstTokens = 1 << 24, kFewestNodes = 8;  // fewer nodes where blocks are huge
constexpr i64 kGrowth = 4;                               // tables grow by a fourth
constexpr std::size_t kLooseKept = 1 << 12;              // finish() frees a longer list of loose nodes
constexpr i32 kFree = -2;                                // the ordinal of a free node
static_assert((kGhosts & (kGhosts - 1)) == 0, "remember() masks keys");
static_assert(kFewestNodes <= kFirstNodes && kFirstNodes <= kMostAtOnce,
              "bounds of least_nodes_ and of the first size");

// Buckets are full at 1.5 nodes each.
bool full(i64 nodes, std::size_t buckets) { return 2 * nodes > 3 * static_cast<i64>(buckets); }

template <class T>
void resize_exactly(std::vector<T>& v, i64 size) {  // resize() alone would double the capacity
  v.reserve(size);
  v.resize(size);
}

}  // namespace

PrefixIndex::PrefixIndex(i64 block_tokens, std::vector<GroupKind> groups, const std::string& policy, int hash_bits,
                         i64 event_capacity, i64 move_capacity, i64 blocks)
    : mask_(hash_bits >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << hash_bits) - 1),
      policy_(make_eviction_policy(policy)),
      events_(event_capacity, block_tokens),
      moves_(move_capacity, block_tokens),
      watched_(events_.on() || moves_.on()),
      tokens_(block_tokens),
      roots_(0, KeyedHash(secret(), secret())),
      ghosts_(kGhosts, 0),
      block_(watched_ ? block_tokens : 0),
      least_nodes_(std::clamp(kFirstTokens / block_tokens, kFewestNodes, kFirstNodes)) {
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const i32 group = static_cast<i32>(g);
    window_of_.push_back(groups[g] == GroupKind::window ? windows_++ : -1);
    if (groups[g] == GroupKind::window) group_of_.push_back(group);
    if (groups[g] == GroupKind::full) full_groups_.push_back(group);
    if (groups[g] == GroupKind::state) state_groups_.push_back(group);
  }
  changes_per_op_ += static_cast<std::size_t>(windows_) + state_groups_.size();
  whole_ = windows_ == 0 || !full_groups_.empty() || !state_groups_.empty();
  items_ = windows_ + whole_;
  cached_parts_.assign(static_cast<std::size_t>(windows_), 0);
  blocks = std::min(std::max(blocks, least_nodes_), kMostAtOnce);
  std::size_t buckets = 1;
  while (full(blocks, buckets)) buckets *= 2;
  buckets_.assign(buckets, kNoNode);
  reserve(blocks + blocks / kSpareShare + least_nodes_);
  seed_ = secret() | 1;  // a secret, so that nobody can choose tokens that share a bucket
}

void PrefixIndex::reserve(i64 nodes) {
  KVMEM_ASSERT(nodes >= capacity(), "tables never shrink");
  const i64 before = capacity();
  tokens_.reserve(nodes);
  policy_->reserve(nodes * items_);
  if (windows_ > 0) resize_exactly(parts_, nodes * windows_);
  resize_exactly(siblings_, nodes);
  if (watched_) resize_exactly(root_of_, nodes);
  if (!tags_.empty()) resize_exactly(tags_, nodes);
  resize_exactly(nodes_, nodes);
  for (i64 id = nodes; id-- > before;) free_node(static_cast<i32>(id));
}

void PrefixIndex::grow_nodes() { reserve(capacity() + std::max(capacity() / kGrowth, least_nodes_)); }

// REQUIRES: there is a free node.
i32 PrefixIndex::new_node() {
  KVMEM_ASSERT(free_ != kNoNode && nodes_[free_].ordinal == kFree, "there is a free node");
  const i32 node = free_;
  free_ = nodes_[node].next_child;
  nodes_[node] = Node();
  if (free_ != kNoNode) {  // prefetches the next free node, which is mostly wanted soon
    __builtin_prefetch(&nodes_[free_], 1);
    tokens_.prefetch(free_);
  }
  return node;
}

void PrefixIndex::free_node(i32 node) {
  Node& n = nodes_[node];
  KVMEM_ASSERT(idle(n) && !n.linked && !n.pinned && !n.aside, "nothing refers to a node that is freed");
  if (!tags_.empty()) tags_[node].reset();
  n.parent = kNoNode;
  n.ordinal = kFree;
  n.next_child = free_;
  free_ = node;
}

void PrefixIndex::put_in_bucket(i32 node) {
  ++in_buckets_;
  i32& head = bucket(nodes_[node].key);
  siblings_[node].next_in_bucket = head;
  head = node;
}

void PrefixIndex::take_out_of_bucket(i32 node) {
  --in_buckets_;
  i32* at = &bucket(nodes_[node].key);
  while (*at != node) at = &siblings_[*at].next_in_bucket;
  *at = siblings_[node].next_in_bucket;
}

void PrefixIndex::grow_buckets() {
  std::vector<i32> old(2 * buckets_.size(), kNoNode);
  old.swap(buckets_);
  for (i32 head : old) {
    while (head != kNoNode) {
      const i32 node = head;
      head = siblings_[node].next_in_bucket;
      i32& to = bucket(nodes_[node].key);
      siblings_[node].next_in_bucket = to;
      to = node;
    }
  }
}

void PrefixIndex::link(i32 node) {
  KVMEM_ASSERT(!nodes_[node].linked && nodes_[node].parent != kNoNode, "the node is not linked, and no root");
  Node& n = nodes_[node];
  Node& parent = nodes_[n.parent];
  const i32 before = parent.first_child;
  if (before != kNoNode) {
    put_in_bucket(before);
    siblings_[before].previous_child = node;
  }
  n.next_child = before;
  parent.first_child = node;
  n.linked = true;
  ++linked_;
}

void PrefixIndex::unlink(i32 node) {
  KVMEM_ASSERT(nodes_[node].linked && nodes_[node].first_child == kNoNode, "the node is linked, and a leaf");
  Node& n = nodes_[node];
  Node& parent = nodes_[n.parent];
  if (parent.first_child == node) {
    parent.first_child = n.next_child;
    if (n.next_child != kNoNode) take_out_of_bucket(n.next_child);
    siblings_[node].previous_child = kNoNode;
  } else {
    const i32 previous = siblings_[node].previous_child;
    take_out_of_bucket(node);
    nodes_[previous].next_child = n.next_child;
    if (n.next_child != kNoNode) siblings_[n.next_child].previous_child = previous;
  }
  n.linked = false;
  --linked_;
}

// Undoes the latest unlink(): the node returns between the same siblings.
void PrefixIndex::relink(i32 node) {
  KVMEM_ASSERT(!nodes_[node].linked, "the node is not linked");
  const i32 previous = siblings_[node].previous_child, next = nodes_[node].next_child;
  if (previous == kNoNode) return link(node);
  put_in_bucket(node);
  nodes_[previous].next_child = node;
  if (next != kNoNode) siblings_[next].previous_child = node;
  nodes_[node].linked = true;
  ++linked_;
}

i32 PrefixIndex::add(i32 parent, const i32* tokens, const std::string* tag) {
  KVMEM_ASSERT(find(parent, tokens, tag) == kNoNode, "the child is new");
  expect_change();
  if (tag && tags_.empty()) resize_exactly(tags_, capacity());
  // Only siblings need a bucket, since the newest child is found through its parent.
  if (nodes_[parent].first_child != kNoNode && full(in_buckets_ + 1, buckets_.size())) grow_buckets();
  if (free_ == kNoNode) grow_nodes();
  tokens_.put(free_, tokens);  // may pack all blocks again, and throw
  if (tag) tags_[free_] = std::make_shared<const std::string>(*tag);
  const i32 node = new_node();
  Node& n = nodes_[node];
  n.key = with_tag(key_after(nodes_[parent].key, tokens), tag);
  if (whole_) policy_->expect(item(node), n.key);
  n.parent = parent;
  n.ordinal = nodes_[parent].ordinal + 1;
  if (watched_) root_of_[node] = root_of_[parent];
  link(node);
  n.added = true;
  loose_.push_back(node);
  return node;
}

void PrefixIndex::undo_acquire(i32 node) {
  KVMEM_ASSERT(nodes_[node].users > 0, "the node is used");
  Node& n = nodes_[node];
  if (--n.users > 0) return;
  if (n.copies == 0) {
    if (n.added) loose_.pop_back();  // a node that lost its last copy is loose too; drop_copy() is undone by itself
    n.added = false;
    return prune(node);
  }
  if (whole_) policy_->undo_use(item(node));
  n.released = true;
  ++cached_;
}

// Makes room for the entries of one more op in each list that a transaction fills.
void PrefixIndex::grow_lists() {
  if (loose_.size() == loose_.capacity()) loose_.reserve(2 * loose_.size() + 16);
  if (changes_.capacity() - changes_.size() < changes_per_op_)
    changes_.reserve(2 * changes_.size() + changes_per_op_ + 15);
}

void PrefixIndex::add_copy(i32 node, i64 group, bool undo) {
  Node& n = nodes_[node];
  if (!n.linked) relink(node);  // undoes the drop_copy() that unlinked it
  const bool first = n.copies++ == 0;
  if (first) {
    KVMEM_ASSERT(!undo || (!loose_.empty() && loose_.back() == node), "changes are undone newest first");
    n.released = n.users == 0;
    cached_ += n.released;
    if (undo) loose_.pop_back();
    if (whole_ && undo) {
      policy_->restore(item(node), n.key, parent_item(n));
      if (n.users > 0) policy_->undo_release(item(node));
    } else if (whole_) {
      policy_->insert(item(node), n.key, parent_item(n));
      if (n.users == 0) policy_->release(item(node));
    }
  }
  if (watched_ && (group < 0 ? first : window_of(group) < 0)) {
    note({node, static_cast<i32>(group), EventKind::stored}, undo);
  }
}

void PrefixIndex::drop_copy(i32 node, i64 group, bool undo) {
  KVMEM_ASSERT(nodes_[node].copies > 0, "the node has a copy");
  Node& n = nodes_[node];
  const bool last = --n.copies == 0;
  if (last) {
    if (whole_ && undo) {
      if (n.released) policy_->undo_release(item(node));
      policy_->undo_insert(item(node), n.key, parent_item(n));
    } else if (whole_) {
      if (!n.released) policy_->release(item(node));
      policy_->evict(item(node), n.key, parent_item(n));
    }
    cached_ -= n.released;
    n.released = false;
    if (!undo) loose_.push_back(node);
    if (!undo && idle(n)) unlink(node);
  }
  if (watched_ && (group < 0 ? last : window_of(group) < 0)) {
    note({node, static_cast<i32>(group), EventKind::removed}, undo);
  }
}

// The key of a part differs from that of its node, because the policy learns about them separately.
std::uint64_t PrefixIndex::part_key(i32 node, i32 window) const {
  return nodes_[node].key + (static_cast<std::uint64_t>(window) + 1) * 0x9e3779b97f4a7c15u;
}

void PrefixIndex::add_window_copy(i32 node, i32 window, bool undo) {
  Part& p = part(node, window);
  if (p.copies++ > 0) return;
  const i32 id = item(node, window);
  cached_parts_[static_cast<std::size_t>(window)] += p.needs == 0;
  if (undo) {
    policy_->restore(id, part_key(node, window), kNoNode);
    if (p.needs > 0) policy_->undo_release(id);
  } else {
    policy_->insert(id, part_key(node, window), kNoNode);
    if (p.needs == 0) policy_->release(id);
  }
  note({node, group_of(window), EventKind::stored}, undo);
}

void PrefixIndex::drop_window_copy(i32 node, i32 window, bool undo) {
  KVMEM_ASSERT(part(node, window).copies > 0, "the window group has a copy");
  Part& p = part(node, window);
  if (--p.copies > 0) return;
  const i32 id = item(node, window);
  cached_parts_[static_cast<std::size_t>(window)] -= p.needs == 0;
  if (undo) {
    if (p.needs == 0) policy_->undo_release(id);
    policy_->undo_insert(id, part_key(node, window), kNoNode);
  } else {
    if (p.needs > 0) policy_->release(id);
    policy_->evict(id, part_key(node, window), kNoNode);
  }
  note({node, group_of(window), EventKind::removed}, undo);
}

void PrefixIndex::need_again(i32 node, i32 window, bool undo) {
  const i32 id = item(node, window);
  undo ? policy_->undo_release(id) : policy_->use(id);
  --cached_parts_[static_cast<std::size_t>(window)];
}

void PrefixIndex::need_no_more(i32 node, i32 window, bool undo) {
  const i32 id = item(node, window);
  undo ? policy_->undo_use(id) : policy_->release(id);
  ++cached_parts_[static_cast<std::size_t>(window)];
}

void PrefixIndex::note_state(i32 node, bool stored, bool undo) {
  const EventKind kind = stored ? EventKind::stored : EventKind::removed;
  for (i32 group : state_groups_) note({node, group, kind}, undo);
}

void PrefixIndex::publish(const Change& change) {
  if (change.kind == EventKind::kept) return moves_.kept(change.node, change.group, change.slot, change.generation);
  const Node& n = nodes_[change.node];
  const bool stored = change.kind == EventKind::stored;
  if (stored) copy_tokens(change.node, block_tokens(), block_.data());
  const auto publish_for = [&](i32 group) {
    for (EventRing* const queue : {&events_, &moves_}) {
      if (!stored) {
        queue->removed(change.node, group);
        continue;
      }
      const i32 parent = is_root(n.parent) ? kNoNode : n.parent;
      queue->stored(change.node, parent, root_of_[change.node], group, n.ordinal, block_.data(), 0, tag(change.node));
    }
    if (stored) note_root(root_of_[change.node]);
  };
  if (change.group == kPath) return publish_for(-1);
  if (change.group >= 0) return publish_for(change.group);
  for (i32 group : full_groups_) publish_for(group);
}

void PrefixIndex::finish_changes(bool committed) {
  if (committed) {
    for (const Change& change : changes_) publish(change);
  }
  changes_.clear();
  while (!loose_.empty()) {
    const i32 node = loose_.back();
    loose_.pop_back();
    Node& n = nodes_[node];
    n.added = false;
    if (n.copies > 0 || n.parent == kNoNode) continue;  // it has a copy, or was freed already
    const bool evicted = committed && n.users == 0;
    if (evicted) remember(n.key), ++evicted_;
    prune(node, evicted);
  }
  if (loose_.capacity() > kLooseKept) std::vector<i32>().swap(loose_);
  KVMEM_ASSERT(changes_.empty() && loose_.empty(), "the transaction left nothing open");
}

// Frees the node if nothing needs it, and its ancestors that only led to it. `evicted`: they lost their last copy
// earlier, while they were used or led to other nodes, and now count as evicted.
void PrefixIndex::prune(i32 node, bool evicted) {
  while (node != kNoNode && nodes_[node].ordinal != kFree && idle(nodes_[node])) {
    Node& n = nodes_[node];
    const i32 parent = n.parent;
    if (parent == kNoNode) {
      drop_root(n.next_child);
    } else if (n.linked) {
      unlink(node);
    }
    if (evicted && parent != kNoNode) remember(n.key);
    free_node(node);
    node = parent;
  }
}

void PrefixIndex::use_again(i32 node) {
  KVMEM_ASSERT(nodes_[node].released, "the node was released");
  if (whole_) policy_->use(item(node));
  nodes_[node].released = false;
  --cached_;
}

void PrefixIndex::drop_last(i32 node) {
  KVMEM_ASSERT(nodes_[node].users == 0, "the last user has left");
  if (nodes_[node].copies == 0) return prune(node);
  if (whole_) policy_->release(item(node));
  nodes_[node].released = true;
  ++cached_;
}

}  // namespace kvmem
