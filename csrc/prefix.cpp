#include "prefix.h"

#include <algorithm>
#include <cstring>
#include <random>

namespace kvmem {
namespace {

constexpr i64 kGhosts = 1 << 14;
constexpr i64 kFirstNodes = 1 << 8, kMostAtOnce = 1 << 16;
constexpr i32 kFree = -2;  // as an ordinal

// Both lengths are told, so that no salt can run into the extra key.
std::string flat(const PrefixKey& key) { return std::to_string(key.salt.size()) + ":" + key.salt + key.extra_key; }

// The two halves of a product of 64-bit numbers, folded: mixes well and costs one multiplication.
std::uint64_t fold(std::uint64_t a, std::uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15u;

}  // namespace

PrefixIndex::PrefixIndex(i64 block_tokens, std::vector<i32> token_groups, const std::string& policy, int hash_bits,
                         i64 event_capacity, i64 blocks)
    : block_tokens_(block_tokens),
      token_groups_(std::move(token_groups)),
      mask_(hash_bits >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << hash_bits) - 1),
      policy_(make_eviction_policy(policy)),
      events_(event_capacity, block_tokens),
      ghosts_(kGhosts, 0) {
  blocks = std::min(std::max(blocks, kFirstNodes), kMostAtOnce);
  i64 buckets = 1;
  while (buckets < blocks) buckets *= 2;
  buckets_.assign(buckets, kNoNode);
  reserve(blocks);
  std::random_device device;  // so that nobody can choose tokens that all fall into one bucket
  seed_ = (std::uint64_t{device()} << 32 | device()) | 1;
}

std::uint64_t PrefixIndex::root_hash(const PrefixKey& key) const {
  return fold(std::hash<std::string>()(flat(key)) ^ seed_, kOdd);
}

std::uint64_t PrefixIndex::key_of(std::uint64_t before, const i32* tokens) const {
  std::uint64_t h = before ^ seed_;
  i64 i = 0;
  for (; i + 2 <= block_tokens_; i += 2) {
    std::uint64_t pair;
    std::memcpy(&pair, tokens + i, sizeof pair);
    h = fold(h ^ pair, kOdd) + seed_;
  }
  if (i < block_tokens_) h = fold(h ^ static_cast<std::uint32_t>(tokens[i]), kOdd) + seed_;
  return fold(h, seed_);
}

i32 PrefixIndex::find_root(const PrefixKey& key) const {
  const auto found = roots_.find(flat(key));
  return found == roots_.end() ? kNoNode : found->second;
}

// Keys are compared first since most strangers in a bucket differ in them; the tokens decide.
i32 PrefixIndex::find(i32 parent, const i32* tokens, std::uint64_t key) const {
  const std::size_t bytes = static_cast<std::size_t>(block_tokens_) * sizeof(i32);
  for (i32 x = bucket(key); x != kNoNode; x = nodes_[x].next) {
    const Node& n = nodes_[x];
    if (((n.key ^ key) & mask_) == 0 && n.parent == parent && std::memcmp(tokens, this->tokens(x), bytes) == 0)
      return x;
  }
  return kNoNode;
}

i32 PrefixIndex::find_or_add(i32 parent, const i32* tokens) {
  const std::uint64_t key = key_of(nodes_[parent].key, tokens);
  const i32 node = find(parent, tokens, key);
  return node != kNoNode ? node : add(parent, tokens, key);
}

i64 PrefixIndex::find_partial(i32 parent, const i32* tokens, i64 count, std::vector<i32>* found) const {
  found->clear();
  i64 most = 1, looked = 0;
  count = std::min(count, block_tokens_);
  for (i32 x = nodes_[parent].first_child; x != kNoNode && looked < kCandidates; x = nodes_[x].next_child, ++looked) {
    const i64 same = std::mismatch(tokens, tokens + count, this->tokens(x)).first - tokens;
    if (same < most || nodes_[x].places == 0) continue;
    if (same > most) found->clear();
    most = same;
    found->push_back(x);
  }
  std::reverse(found->begin(), found->end());
  return found->empty() ? 0 : most;
}

bool PrefixIndex::was_evicted(i32 parent, const PrefixKey& key, const i32* tokens) const {
  const std::uint64_t ghost = key_of(parent == kNoNode ? root_hash(key) : nodes_[parent].key, tokens);
  return ghosts_[ghost & (kGhosts - 1)] == ghost;
}

i64 PrefixIndex::longest_elsewhere(i32 root, const i32* tokens, i64 count) const {
  i64 best = 0, looked = 0;
  for (const auto& [name, other] : roots_) {
    if (other == root) continue;
    if (looked++ == kCandidates) break;
    i64 blocks = 0;
    for (i32 x = other; (blocks + 1) * block_tokens_ <= count; ++blocks) {
      x = find(x, tokens + blocks * block_tokens_);
      if (x == kNoNode || nodes_[x].places == 0) break;
    }
    best = std::max(best, blocks);
  }
  return best;
}

i32 PrefixIndex::unused_child(i32 node) const {
  for (i32 x = nodes_[node].first_child; x != kNoNode; x = nodes_[x].next_child) {
    if (nodes_[x].users == 0 && nodes_[x].places > 0) return x;
  }
  return kNoNode;
}

void PrefixIndex::reserve(i64 nodes) {
  const i64 before = capacity();
  tokens_.resize(nodes * block_tokens_);
  policy_->reserve(nodes);
  free_.reserve(nodes);
  loose_.reserve(nodes);
  nodes_.resize(nodes);
  for (i64 id = nodes; id-- > before;) free_.push_back(static_cast<i32>(id));
}

void PrefixIndex::start_retention() {
  auto retention = std::make_unique<RetentionPolicy>(std::move(policy_));
  retention_ = retention.get();
  policy_ = std::move(retention);
  policy_->reserve(capacity());
  for (i64 x = 0; x < capacity(); ++x) {
    if (nodes_[x].places > 0) retention_->follow(static_cast<i32>(x), nodes_[x].released);
  }
  for (i64 x = 0; x < capacity(); ++x) {
    const i32 parent = nodes_[x].parent;
    if (nodes_[x].places > 0 && !is_root(parent)) retention_->lead(parent, static_cast<i32>(x));
  }
}

i32 PrefixIndex::new_node() {
  if (free_.empty()) reserve(2 * capacity());
  const i32 node = free_.back();
  free_.pop_back();
  nodes_[node] = Node();
  return node;
}

void PrefixIndex::grow_buckets() {
  std::vector<i32> old(2 * buckets_.size(), kNoNode);
  old.swap(buckets_);
  for (i32 head : old) {
    while (head != kNoNode) {
      const i32 node = head;
      head = nodes_[node].next;
      i32& to = bucket(nodes_[node].key);
      nodes_[node].next = to;
      to = node;
    }
  }
}

void PrefixIndex::link(i32 node) {
  if (linked_ >= static_cast<i64>(buckets_.size())) grow_buckets();
  Node& n = nodes_[node];
  Node& parent = nodes_[n.parent];
  i32& head = bucket(n.key);
  n.next = head;
  head = node;
  n.previous_child = kNoNode;
  n.next_child = parent.first_child;
  if (n.next_child != kNoNode) nodes_[n.next_child].previous_child = node;
  parent.first_child = node;
  n.linked = true;
  ++linked_;
}

void PrefixIndex::unlink(i32 node) {
  Node& n = nodes_[node];
  i32* at = &bucket(n.key);
  while (*at != node) at = &nodes_[*at].next;
  *at = n.next;
  if (n.previous_child == kNoNode) {
    nodes_[n.parent].first_child = n.next_child;
  } else {
    nodes_[n.previous_child].next_child = n.next_child;
  }
  if (n.next_child != kNoNode) nodes_[n.next_child].previous_child = n.previous_child;
  n.linked = false;
  --linked_;
}

i32 PrefixIndex::open_root(const PrefixKey& key) {
  i32 root = find_root(key);
  if (root == kNoNode) {
    root = new_node();
    const i32 number = roots_seen_++;
    nodes_[root].root = number;
    nodes_[root].key = root_hash(key);
    root_keys_.emplace(number, RootKey{key});
    roots_.emplace(flat(key), root);
  }
  ++nodes_[root].users;
  return root;
}

i32 PrefixIndex::add(i32 parent, const i32* tokens, std::uint64_t key) {
  const i32 node = new_node();
  Node& n = nodes_[node];
  n.key = key;
  n.parent = parent;
  n.ordinal = nodes_[parent].ordinal + 1;
  n.root = nodes_[parent].root;
  std::copy(tokens, tokens + block_tokens_, &tokens_[node * block_tokens_]);
  link(node);
  loose_.push_back(node);
  return node;
}

void PrefixIndex::place(i32 node, i64 group, bool undo) {
  Node& n = nodes_[node];
  if (!n.linked) link(node);  // its giving up is taken back
  const bool first = n.places++ == 0;
  if (first) {
    if (undo) {
      policy_->restore(node, n.key, n.ordinal > 0 ? n.parent : kNoNode);
      if (n.users > 0) policy_->use(node);
    } else {
      policy_->insert(node, n.key, n.ordinal > 0 ? n.parent : kNoNode);
      if (n.users == 0) policy_->release(node);
    }
    n.released = n.users == 0;
    cached_ += n.released;
  }
  if (first || group >= 0) note({node, static_cast<i32>(group), true}, undo);
}

void PrefixIndex::displace(i32 node, i64 group, bool undo) {
  Node& n = nodes_[node];
  const bool last = --n.places == 0;
  if (last) {
    if (!n.released) policy_->release(node);
    policy_->evict(node, n.key, n.ordinal > 0 ? n.parent : kNoNode);
    cached_ -= n.released;
    n.released = false;
    loose_.push_back(node);
    if (idle(n)) unlink(node);
  }
  if (last || group >= 0) note({node, static_cast<i32>(group), false}, undo);
}

void PrefixIndex::note(const Told& told, bool undo) {
  if (!events_.on()) return;
  if (undo) {
    told_.pop_back();
  } else {
    told_.push_back(told);
  }
}

void PrefixIndex::tell(const Told& told) {
  const Node& n = nodes_[told.node];
  for (i32 group : token_groups_) {
    if (told.group >= 0 && group != told.group) continue;
    if (told.stored) {
      const i32 parent = is_root(n.parent) ? kNoNode : n.parent;
      events_.stored(told.node, parent, n.root, group, n.ordinal, tokens(told.node));
    } else {
      events_.removed(told.node, group);
    }
  }
}

void PrefixIndex::finish(bool committed) {
  if (committed) {
    for (const Told& told : told_) tell(told);
  }
  told_.clear();
  while (!loose_.empty()) {
    const i32 node = loose_.back();
    loose_.pop_back();
    Node& n = nodes_[node];
    if (n.places > 0 || n.parent == kNoNode) continue;  // taken back, or gone already
    if (committed && n.users == 0) {
      ghosts_[n.key & (kGhosts - 1)] = n.key;
      ++evicted_;
    }
    prune(node);
  }
}

// Frees the node, and those before it that led only here.
void PrefixIndex::prune(i32 node) {
  while (node != kNoNode && nodes_[node].ordinal != kFree && idle(nodes_[node])) {
    Node& n = nodes_[node];
    const i32 parent = n.parent;
    if (parent == kNoNode) {
      const auto key = root_keys_.find(n.root);
      roots_.erase(flat(key->second.key));
      if (events_.on()) {
        key->second.gone = true;
      } else {
        root_keys_.erase(key);
      }
    } else if (n.linked) {
      unlink(node);
    }
    n.parent = kNoNode;
    n.ordinal = kFree;
    free_.push_back(node);
    node = parent;
  }
}

const PrefixKey& PrefixIndex::root_key(i32 number) const {
  const auto found = root_keys_.find(number);
  if (found == root_keys_.end()) throw SpecError("no root has the number " + std::to_string(number));
  return found->second.key;
}

std::vector<i32> PrefixIndex::roots() const {
  std::vector<i32> found;
  for (const auto& [name, root] : roots_) found.push_back(root);
  return found;
}

std::vector<i32> PrefixIndex::below(i32 root) const {
  std::vector<i32> found{root};
  for (std::size_t i = 0; i < found.size(); ++i) {
    for (i32 x = nodes_[found[i]].first_child; x != kNoNode; x = nodes_[x].next_child) found.push_back(x);
  }
  found.erase(found.begin());
  return found;
}

void PrefixIndex::forget_roots() {
  for (auto it = root_keys_.begin(); it != root_keys_.end();) it = it->second.gone ? root_keys_.erase(it) : ++it;
}

void PrefixIndex::enter(i32 node) {
  Node& n = nodes_[node];
  if (n.users++ > 0 || !n.released) return;
  policy_->use(node);
  n.released = false;
  --cached_;
}

void PrefixIndex::leave(i32 node) {
  Node& n = nodes_[node];
  if (--n.users > 0) return;
  if (n.places > 0) {
    policy_->release(node);
    n.released = true;
    ++cached_;
  } else {
    prune(node);
  }
}

void PrefixIndex::check(const std::vector<i32>& users, std::vector<std::string>* out) const {
  std::vector<i32> children(nodes_.size(), 0);
  i64 cached = 0, pins = 0;
  const auto say = [out](i64 node, const std::string& what) {
    out->push_back("cached block " + std::to_string(node) + ": " + what);
  };
  for (i64 x = 0; x < capacity(); ++x) {
    const Node& n = nodes_[x];
    pins += n.pins;
    if (n.parent == kNoNode) continue;
    const Node& parent = nodes_[n.parent];
    if (n.ordinal != parent.ordinal + 1 || n.root != parent.root) say(x, "does not continue the block before it");
    if (find(n.parent, tokens(static_cast<i32>(x))) != x) say(x, "invariant 7: its own tokens do not lead to it");
    if (idle(n)) say(x, "neither used nor in memory, and leads nowhere");
    if (n.users != users[x]) {
      say(x, "counted " + std::to_string(n.users) + " users, but " + std::to_string(users[x]) + " use it");
    }
    if (n.released != (n.places > 0 && n.users == 0)) say(x, "invariant 2: its policy thinks otherwise of it");
    cached += n.released;
  }
  if (cached != cached_ || pins != pinned_) out->push_back("the counts of cached or pinned blocks are wrong");
}

}  // namespace kvmem
