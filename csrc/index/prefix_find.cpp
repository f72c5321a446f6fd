// The functions of PrefixIndex that change nothing: lookups, check() and digest().

#include <algorithm>
#include <cstring>

#include "index/prefix_index.h"

namespace kvmem {
namespace {

// XORs the two halves of a 128-bit product: mixes well at the cost of one multiplication.
std::uint64_t fold(std::uint64_t a, std::uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15u;

std::uint64_t load_pair(const i32* tokens) {
  std::uint64_t pair;
  std::memcpy(&pair, tokens, sizeof pair);
  return pair;
}

}  // namespace

// The length comes first, so that no salt and extra key equal another pair in one text.
std::string PrefixIndex::flat(const PrefixKey& key) {
  return std::to_string(key.salt.size()) + ":" + key.salt + key.extra_key;
}

std::uint64_t PrefixIndex::root_hash(const PrefixKey& key) const {
  return fold(roots_.hash_function()(flat(key)) ^ seed_, kOdd);
}

// The hash of a block's tokens does not depend on the blocks before it until the last step, so the multiplications of
// successive blocks overlap. The secret factor keeps an attacker from constructing collisions.
std::uint64_t PrefixIndex::key_after(std::uint64_t before, const i32* tokens) const {
  const i64 count = block_tokens();
  std::uint64_t h = kOdd;
  i64 i = 0;
  for (; i + 4 <= count; i += 4) h = fold(load_pair(tokens + i) ^ seed_, load_pair(tokens + i + 2) ^ h);
  if (i < count) {
    i32 rest[4] = {};
    std::copy(tokens + i, tokens + count, rest);
    h = fold(load_pair(rest) ^ seed_, load_pair(rest + 2) ^ h);
  }
  return fold(h ^ before, seed_);
}

i32 PrefixIndex::find_root(const PrefixKey& key) const {
  const auto found = roots_.find(flat(key));
  return found == roots_.end() ? kNoNode : found->second;
}

// Tags are rare in a chain, so one multiplication for each 8 bytes is affordable.
std::uint64_t PrefixIndex::with_tag(std::uint64_t key, const std::string* tag) const {
  if (!tag) return key;
  std::uint64_t h = fold(tag->size() ^ seed_, kOdd);
  for (std::size_t i = 0; i < tag->size(); i += sizeof h) {
    std::uint64_t word = 0;
    std::memcpy(&word, tag->data() + i, std::min(sizeof word, tag->size() - i));
    h = fold(word ^ seed_, h ^ kOdd);
  }
  return fold(h ^ key, seed_);
}

i32 PrefixIndex::find(i32 parent, const i32* tokens, const std::string* tag) const {
  const i32 newest = nodes_[parent].first_child;
  if (newest == kNoNode || (tokens_.equal(newest, tokens) && has_tag(newest, tag))) return newest;
  return nodes_[newest].next_child == kNoNode ? kNoNode : find_sibling(parent, tokens, tag);
}

// Compares keys first, since most other nodes in a bucket differ in them; the token ids decide.
i32 PrefixIndex::find_sibling(i32 parent, const i32* tokens, const std::string* tag) const {
  const std::uint64_t key = with_tag(key_after(nodes_[parent].key, tokens), tag);
  for (i32 x = bucket(key); x != kNoNode; x = siblings_[x].next_in_bucket) {
    const Node& n = nodes_[x];
    if (((n.key ^ key) & mask_) == 0 && n.parent == parent && tokens_.equal(x, tokens) && has_tag(x, tag)) return x;
  }
  return kNoNode;
}

void PrefixIndex::find_partial(i32 parent, const i32* tokens, i64 count, const std::string* tag,
                               std::vector<PartOfBlock>* found) const {
  found->clear();
  i64 looked = 0;
  count = std::min(count, block_tokens() - 1);
  for (i32 x = nodes_[parent].first_child; x != kNoNode && looked < kNewest; x = nodes_[x].next_child, ++looked) {
    i64 same = tokens_.common(x, tokens, count);
    if (tag || !tags_.empty()) same = std::min(same, tokens_alike(this->tag(x).get(), tag, block_tokens()));
    if (same == 0 || nodes_[x].copies == 0) continue;
    const auto no_more = [same](const PartOfBlock& other) { return other.tokens <= same; };
    found->insert(std::find_if(found->begin(), found->end(), no_more), {x, same});
  }
}

// Without whole nodes, copies are not asked: a row counts a copy of a block that no window shows any more, because
// other blocks of the row follow it.
bool PrefixIndex::in_memory(i32 node) const {
  bool any = whole_ && nodes_[node].copies > 0;
  for (i32 w = 0; !whole_ && !any && w < windows_; ++w) any = has_window(node, w);
  return any;
}

bool PrefixIndex::has_other_tag(i32 parent, const i32* tokens) const {
  if (tags_.empty()) return false;
  i64 looked = 0;
  for (i32 x = nodes_[parent].first_child; x != kNoNode && looked < kCandidates; x = nodes_[x].next_child, ++looked) {
    if (in_memory(x) && tokens_.equal(x, tokens)) return true;
  }
  return false;
}

bool PrefixIndex::was_evicted(i32 parent, const PrefixKey& key, const i32* tokens, const std::string* tag) const {
  const std::uint64_t before = parent == kNoNode ? root_hash(key) : nodes_[parent].key;
  const std::uint64_t ghost = with_tag(key_after(before, tokens), tag);
  return ghosts_[ghost & (ghosts_.size() - 1)] == ghost;
}

i64 PrefixIndex::longest_elsewhere(i32 root, const i32* tokens, i64 count) const {
  i64 best = 0, looked = 0;
  for (const auto& [name, other] : roots_) {
    if (other == root) continue;
    if (looked++ == kCandidates) break;
    i32 x = other;
    for (i64 blocks = 1; blocks * block_tokens() <= count; ++blocks) {
      x = find(x, tokens + (blocks - 1) * block_tokens());
      if (x == kNoNode) break;
      if (in_memory(x)) best = std::max(best, blocks);
    }
  }
  return best;
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

void PrefixIndex::check(const std::vector<i32>& users, std::vector<std::string>* out) const {
  std::vector<i32> children(nodes_.size(), 0);
  std::vector<i32> block(block_tokens());
  std::vector<i64> parts(static_cast<std::size_t>(windows_), 0);
  i64 cached = 0, pins = 0, linked = 0, siblings = 0;
  const auto say = [out](i64 node, const std::string& what) {
    out->push_back("cached block " + std::to_string(node) + ": " + what);
  };
  for (i64 x = 0; x < capacity(); ++x) {
    const Node& n = nodes_[x];
    const auto pinned = pins_.find(static_cast<i32>(x));
    if (n.pinned != (pinned != pins_.end())) say(x, "its pin mark contradicts its pin count");
    if (n.pinned) pins += pinned->second;
    if (n.parent == kNoNode) continue;
    const Node& parent = nodes_[n.parent];
    const bool same_root = !watched_ || root_of_[x] == root_of_[n.parent];
    if (n.ordinal != parent.ordinal + 1 || !same_root)
      say(x, "its ordinal or root does not follow from the block before it");
    copy_tokens(static_cast<i32>(x), block_tokens(), block.data());
    if (find(n.parent, block.data(), tag(static_cast<i32>(x)).get()) != x)
      say(x, "invariant 7: a lookup of its tokens does not find it");
    if (idle(n)) say(x, "it has no users, no copies and no children, but was not removed");
    if (n.users != users[x]) {
      say(x, "it counts " + std::to_string(n.users) + " users, but has " + std::to_string(users[x]));
    }
    if (n.released != (n.copies > 0 && n.users == 0))
      say(x, "invariant 2: it is released, or in use, against its counts");
    cached += n.released;
    for (i32 w = 0; w < windows_; ++w) {
      const Part& p = part(static_cast<i32>(x), w);
      parts[static_cast<std::size_t>(w)] += p.copies > 0 && p.needs == 0;
      const bool more = p.copies > 0 && n.copies == 0;
      if (more) say(x, "a window group has a copy in a tier where the node has none");
    }
    linked += n.linked;
    siblings += n.linked && parent.first_child != x;
  }
  if (linked != linked_ || siblings != in_buckets_) out->push_back("the counts of linked blocks are wrong");
  if (parts != cached_parts_) out->push_back("the counts of unreferenced window parts are wrong");
  if (cached != cached_ || pins != pinned_) out->push_back("the counts of cached or pinned blocks are wrong");
}

// The free list is state, since it says which node is allocated next. Not included are the nodes at the end of the list
// that only a growth of the tables has made, and keys: each index has a secret of its own, so tokens stand for them.
void PrefixIndex::digest(Hasher& hash) const {
  std::vector<i32> tokens(block_tokens());
  for (i64 x = 0; x < capacity(); ++x) {
    const Node& n = nodes_[x];
    if (n.ordinal < -1) continue;  // a free node
    hash.add(x, n.parent, n.ordinal, n.first_child, n.next_child, n.users);
    hash.add(n.copies, n.linked, n.released, n.pinned);
    if (n.ordinal >= 0) {
      tokens_.copy(static_cast<i32>(x), block_tokens(), tokens.data());
      hash.add_all(tokens);
      if (!tags_.empty() && tags_[x]) hash.add_text(*tags_[x]);
    }
    if (watched_) hash.add(root_of_[x]);
    for (i32 w = 0; w < windows_; ++w) {
      const Part& p = part(static_cast<i32>(x), w);
      hash.add(p.copies, p.needs, p.aside);
    }
  }
  policy_->digest(hash);
  std::vector<i32> free;
  for (i32 x = free_; x != kNoNode; x = nodes_[x].next_child) free.push_back(x);
  for (i64 last = capacity() - 1; !free.empty() && free.back() == last; --last) free.pop_back();
  hash.add_all(free);
  for (const auto& [node, count] : pins_) {
    Hasher one;
    one.add(node, count);
    hash.add_member(one);
  }
  for (const auto& [name, root] : roots_) {
    Hasher one;
    one.add_text(name);
    one.add(root);
    hash.add_member(one);
  }
  for (const auto& [number, root] : root_keys_) {
    Hasher one;
    one.add_text(root.flat);
    one.add(number);
    hash.add_member(one);
  }
  hash.add(roots_seen_, linked_, in_buckets_, cached_, pinned_, evicted_);
  hash.add(events_.serial(), events_.size(), events_.lost(), moves_.serial(), moves_.size(), moves_.lost());
}

}  // namespace kvmem
