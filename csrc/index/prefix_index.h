// The content index: which blocks of tokens are known, as a trie of full blocks. A node is one block of token ids after
// the blocks of its parent; the first ones hang on a root, one for each (salt, extra key). So a path from a root is a
// prefix of some sequence, and finding a node means that every token of it was compared: no digest is believed
// (invariant 7), and nothing under one salt is ever found under another (invariant 9).
//
// Most blocks are the only continuation of the one before them. So the newest child of a node is found through the node
// itself, and only its siblings through a hash table: what continues a sequence that nobody forked reads the node, the
// child and the child's tokens, and computes no hash.
//
// The index knows no memory. A page table tells it with place() and displace() in how many places a node's tokens lie;
// sequences and pins tell it with enter() and leave() whether they use it. A node without memory stays only as a step
// on the path to others (sliding windows leave such) or while it is used.
//
// What is evicted is an Item: a node, or only what one group with a sliding window holds of it. A window passes blocks
// while their sequence goes on, so such a part has users of its own (need(), unneed()) and stands in the same eviction
// order as whole nodes: by when and how often it was used, whoever holds the rest of the node.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/digest.h"
#include "base/keyed_hash.h"
#include "base/types.h"
#include "eviction/retention.h"
#include "index/block_tags.h"
#include "index/events.h"
#include "index/token_blocks.h"

namespace kvmem {

constexpr i32 kNoNode = -1;

// What a content may be shared with: only that of the same salt and adapter, as far as `marks` do not tell them apart.
// All are compared byte for byte.
struct PrefixKey {
  std::string salt, extra_key;  // the latter is the adapter's
  KeyMarks marks;               // of one prompt; a root has none
};

// What a group of the cache means to the index.
enum class GroupKind : std::uint8_t {
  none,    // holds no content that could be shared
  full,    // every token of a sequence
  window,  // the last tokens of a sequence
  state,   // a snapshot of a fixed state, at the end of some blocks
};

// What is evicted at once: the content of a node in the group that is window number `window`, or (-1) all of the node,
// after which nothing that continues it can be found either.
struct Item {
  i32 node = kNoNode;
  i32 window = -1;
};

// The first tokens of a cached block.
struct PartOfBlock {
  i32 node;
  i64 tokens;
};

class PrefixIndex {
 public:
  // `groups`: the kind of each. `hash_bits` under 64 makes hashes collide, for tests. `blocks`: about how many there is
  // memory for. Tables are made for as many at once, up to some 65,000, so that no call later pays for their growth.
  PrefixIndex(i64 block_tokens, std::vector<GroupKind> groups, const std::string& policy, int hash_bits,
              i64 event_capacity, i64 blocks);

  i64 block_tokens() const { return tokens_.block_tokens(); }
  i32 windows() const { return windows_; }  // groups with a sliding window
  bool whole() const { return whole_; }     // whole nodes are evicted; else only what windows hold of them
  // The number of the group among those with a window, -1 if it has none; and the group of that number.
  i32 window_of(i64 group) const { return window_of_[static_cast<std::size_t>(group)]; }
  i32 group_of(i32 window) const { return group_of_[static_cast<std::size_t>(window)]; }

  // --- finding; no side effect ---
  i32 find_root(const PrefixKey& key) const;
  // The child of `parent` that holds these block_tokens() tokens, and has this tag (block_tags.h; null for none).
  i32 find(i32 parent, const i32* tokens, const std::string* tag = nullptr) const;
  // The children that begin with some of tokens [0, count), but not all of their own: those with most of them first, of
  // equal ones the oldest. Of many children it looks at the newest kNewest: those of a prompt that ends within a block
  // all begin with its rest.
  // Tokens from the first one on that `tag` tells apart do not count.
  void find_partial(i32 parent, const i32* tokens, i64 count, const std::string* tag,
                    std::vector<PartOfBlock>* found) const;
  // True if the block was known and its memory given up; `parent` kNoNode for the first block under `key`, whose root
  // may be gone. Remembers some thousands, and errs at 2^-64 a question.
  bool was_evicted(i32 parent, const PrefixKey& key, const i32* tokens, const std::string* tag) const;
  // True if a child of `parent` holds these tokens, in memory, under whatever tag.
  bool has_other_tag(i32 parent, const i32* tokens) const;
  const std::shared_ptr<const std::string>& tag(i32 node) const { return tags_.empty() ? no_tag_ : tags_[node]; }
  // The longest chain of these tokens under any other root, in blocks; looks at kCandidates roots.
  i64 longest_elsewhere(i32 root, const i32* tokens, i64 count) const;

  i32 parent(i32 node) const { return nodes_[node].parent; }
  i64 ordinal(i32 node) const { return nodes_[node].ordinal; }  // -1 for a root
  bool is_root(i32 node) const { return nodes_[node].ordinal < 0; }
  bool used(i32 node) const { return nodes_[node].users > 0; }
  i32 users(i32 node) const { return nodes_[node].users; }
  bool has_siblings(i32 node) const {
    return nodes_[nodes_[node].parent].first_child != node || nodes_[node].next_child != kNoNode;
  }
  bool pinned(i32 node) const { return nodes_[node].pinned; }
  i32 places(i32 node) const { return nodes_[node].places; }
  // The first `count` of them.
  void copy_tokens(i32 node, i64 count, i32* out) const { tokens_.copy(node, count, out); }
  // The window group has the node's tokens somewhere; and how many sequences and pins need that.
  bool has_window(i32 node, i32 window) const { return part(node, window).places > 0; }
  i32 window_places(i32 node, i32 window) const { return part(node, window).places; }
  i32 needs(i32 node, i32 window) const { return part(node, window).needs; }
  // A child that nobody uses, and one that stands behind `node` among its siblings; kNoNode if there is none. Windows
  // may have nothing of it.
  i32 unused_child(i32 node) const { return first_unused(nodes_[node].first_child); }
  i32 unused_sibling(i32 node) const { return first_unused(nodes_[node].next_child); }
  // True if f() of all children with memory is.
  template <class F>
  bool all_cached_children(i32 node, F f) const {
    for (i32 x = nodes_[node].first_child; x != kNoNode; x = nodes_[x].next_child) {
      if (nodes_[x].places > 0 && !f(x)) return false;
    }
    return true;
  }
  i64 capacity() const { return static_cast<i64>(nodes_.size()); }  // ids are below it

  // --- state: what transactions change and take back ---
  // The node's tokens lie in one more place, or one fewer: of this group, or (-1) of all that are not told apart.
  // expect_change() comes before the first of a record's changes, and may find no memory; these then need none, and
  // neither does taking them back.
  void expect_change() {
    expect_places();
    if (loose_.size() == loose_.capacity()) grow_lists();
  }
  // The same where nothing but places are added.
  void expect_places() {
    if (events_.on() && told_.capacity() - told_.size() < told_at_once_) grow_lists();
  }
  void place(i32 node, i64 group, bool undo);
  void displace(i32 node, i64 group, bool undo);
  // The window group has the node's tokens in one more place, or one fewer.
  void gain(i32 node, i32 window, bool undo);
  void lose(i32 node, i32 window, bool undo);
  // One more sequence or pin needs what the window group has of the node, or one fewer. `undo`: the other of the two is
  // taken back, so that the eviction order is as it was.
  void need(i32 node, i32 window, bool undo = false) {
    Part& p = part(node, window);
    if (p.needs++ == 0 && p.places > 0) need_again(node, window, undo);
  }
  void unneed(i32 node, i32 window, bool undo) {
    Part& p = part(node, window);
    if (--p.needs == 0 && p.places > 0) need_no_more(node, window, undo);
  }
  // A state group has a snapshot of the node, or has it no more, where place() does not say so.
  void note_state(i32 node, bool stored, bool undo);
  // The end of a transaction: nodes without memory and use are gone now, and events are told.
  void finish(bool committed) {
    if (!told_.empty() || !loose_.empty()) finish_changes(committed);
  }
  i64 aged() const { return policy_->aged(); }

  // --- use ---
  // Counts one user; makes the root where there is none. May find no memory, and has changed nothing then. `*made`:
  // whether it did.
  i32 open_root(const PrefixKey& key, bool* made);
  // A child that find() did not find; without users, and gone at finish() if it got no place. As open_root().
  i32 add(i32 parent, const i32* tokens, const std::string* tag = nullptr);
  // These take back open_root() and enter(), or add() with enter(), in reverse order: all is as before them, the order
  // in which blocks are given up and nodes are made included. What follows here cannot fail.
  void unopen_root(i32 root, bool made);
  void unenter(i32 node);
  // enter() or leave() of this node will follow. Of a chain each is found through the one behind it, so that a
  // processor would wait for one after the other; who knows them all by another way says so before.
  void prefetch(i32 node) const {
    __builtin_prefetch(nodes_.data() + node, 1);
    if (whole_) policy_->prefetch(item(node));
  }
  // One more user.
  void enter(i32 node) {
    Node& n = nodes_[node];
    if (n.users++ == 0 && n.released) use_again(node);
  }
  // One fewer; of a chain, the last block first.
  void leave(i32 node) {
    if (--nodes_[node].users == 0) leave_last(node);
  }
  // A new sequence found it, or found what lies behind it.
  void hit(i32 node) {
    if (nodes_[node].places > 0 && whole_) policy_->hit(item(node));
  }
  void hit_window(i32 node, i32 window) {
    if (part(node, window).places > 0) policy_->hit(item(node, window));
  }
  void pin(i32 node);  // may find no memory
  void unpin(i32 node);
  void undo_pins(i32 last, i32 end);  // of the nodes from `last` to before `end`, towards the root, just pinned
  // retain() may come from now on. May find no memory.
  void expect_retention() {
    if (!retention_) start_retention();
  }
  // Of what is not in memory there is nothing to keep.
  void retain(i32 node, int priority, double seconds);

  // The cached item to evict next, node kNoNode if there is none.
  Item victim() { return item_of(policy_->victim()); }
  // victim() does not name it until put_back(), after which it stands where it stood; it is not evicted before that. In
  // reverse order, if there are several; nobody comes to use it in between.
  bool is_aside(Item x) const {
    return asides_ > 0 && (x.window < 0 ? nodes_[x.node].aside : part(x.node, x.window).aside);
  }
  i64 asides() const { return asides_; }
  void set_aside(Item x);
  void put_back(Item x);
  // Blocks with memory that nobody uses: nodes, or what the first window has of some where no other group has any.
  i64 cached() const { return whole_ ? cached_ : cached_parts_[0]; }
  // Those of which the window group has something that nobody needs.
  i64 cached(i32 window) const { return cached_parts_[static_cast<std::size_t>(window)]; }
  bool empty() const { return linked_ == 0; }
  i64 pinned_count() const { return pinned_; }
  i64 evicted() const { return evicted_; }  // nodes that lost their memory, ever
  EventRing& events() { return events_; }
  // The salt and extra key of the root that events call `number`; known while it is there or a waiting event names it,
  // and until forget_roots() after that.
  const PrefixKey& root_key(i32 number) const;
  void forget_roots();
  std::vector<i32> roots() const;
  // All nodes that continue `root`, a parent before its children.
  std::vector<i32> below(i32 root) const;
  i32 root_number(i32 node) const { return root_of_[node]; }  // where events are on
  void check(const std::vector<i32>& users, std::vector<std::string>* out) const;
  void digest(Hasher& hash) const;  // prefix_find.cpp

  static constexpr i64 kCandidates = 32, kNewest = 8;

 private:
  // Half a cache line, so that every call touches one for each node.
  struct alignas(32) Node {
    std::uint64_t key = 0;  // hash of the root's name and all tokens from the start on
    i32 parent = kNoNode, ordinal = -1;
    i32 first_child = kNoNode;  // the newest; the others follow by next_child
    i32 next_child = kNoNode;   // of a root, which has no siblings, its number; of a free node, the next free one
    i32 users = 0;
    std::uint32_t places : 27;
    std::uint32_t linked : 1;    // can be found
    std::uint32_t released : 1;  // its policy may name it
    std::uint32_t pinned : 1;
    std::uint32_t aside : 1;
    std::uint32_t added : 1;  // by the transaction in progress
    Node() : places(0), linked(0), released(0), pinned(0), aside(0), added(0) {}
  };
  // Of a node that is not the newest child of its parent.
  struct Sibling {
    i32 next_in_bucket, previous_child;
  };
  // What one window group has of a node.
  struct Part {
    i32 places = 0, needs = 0;
    bool aside = false;
  };
  struct Told {
    i32 node;
    i32 group;
    bool stored;
  };
  struct RootKey {
    PrefixKey key;
    std::string flat;
    i64 told = 0;  // the serial of the last event that names it
  };

  static std::string flat(const PrefixKey& key);
  std::uint64_t root_hash(const PrefixKey& key) const;
  std::uint64_t key_after(std::uint64_t before, const i32* tokens) const;
  i32& bucket(std::uint64_t key) { return buckets_[key & mask_ & (buckets_.size() - 1)]; }
  i32 bucket(std::uint64_t key) const { return buckets_[key & mask_ & (buckets_.size() - 1)]; }
  i32 first_unused(i32 node) const {
    while (node != kNoNode && nodes_[node].users > 0) node = nodes_[node].next_child;
    return node;
  }
  // True if a group has something of it: whole nodes are all there or not at all.
  bool in_memory(i32 node) const;
  i32 find_sibling(i32 parent, const i32* tokens, const std::string* tag) const;
  bool has_tag(i32 node, const std::string* tag) const {
    if (tags_.empty()) return tag == nullptr;
    const std::string* own = tags_[node].get();
    return own == tag || (own && tag && *own == *tag);
  }
  std::uint64_t with_tag(std::uint64_t key, const std::string* tag) const;
  i32 new_node();
  void free_node(i32 node);
  void reserve(i64 nodes);
  void grow_nodes();
  void start_retention();
  void link(i32 node);
  void relink(i32 node);
  void unlink(i32 node);
  void put_in_bucket(i32 node);
  void take_out_of_bucket(i32 node);
  void count_unpinned(i32 node);
  void grow_buckets();
  // Numbers of items, as the policy has them: of each node first the whole, then its parts.
  i32 item(i32 node) const { return node * items_; }
  i32 item(i32 node, i32 window) const { return node * items_ + whole_ + window; }
  i32 id_of(Item x) const { return x.window < 0 ? item(x.node) : item(x.node, x.window); }
  Item item_of(i32 id) const {
    if (items_ == 1) return {id, id < 0 || whole_ ? -1 : 0};
    return id < 0 ? Item() : Item{id / items_, id % items_ - whole_};
  }
  Part& part(i32 node, i32 window) { return parts_[static_cast<std::size_t>(node * windows_ + window)]; }
  const Part& part(i32 node, i32 window) const { return parts_[static_cast<std::size_t>(node * windows_ + window)]; }
  std::uint64_t part_key(i32 node, i32 window) const;
  i32 parent_item(const Node& n) const { return n.ordinal > 0 ? item(n.parent) : kNoNode; }
  void need_again(i32 node, i32 window, bool undo);
  void need_no_more(i32 node, i32 window, bool undo);
  void use_again(i32 node);
  void leave_last(i32 node);
  bool idle(const Node& n) const { return n.users == 0 && n.places == 0 && n.first_child == kNoNode; }
  void prune(i32 node, bool evicted = false);
  void remember(std::uint64_t key) { ghosts_[key & (ghosts_.size() - 1)] = key; }
  void note(const Told& told, bool undo) {
    if (!events_.on()) return;
    undo ? told_.pop_back() : told_.push_back(told);
  }
  [[gnu::cold, gnu::noinline]] void grow_lists();
  void finish_changes(bool committed);
  void tell(const Told& told);
  void note_root(i32 number);
  void leave_root(i32 number);
  bool is_waiting(const RootKey& root) const { return root.told > events_.serial() - events_.size(); }

  std::vector<i32> full_groups_, state_groups_, window_of_, group_of_;
  i32 windows_ = 0;
  bool whole_ = true;         // nodes are items: some group holds every token, or snapshots
  i32 items_ = 1;             // of each node
  const std::uint64_t mask_;  // of keys, for tests
  std::uint64_t seed_;
  std::unique_ptr<EvictionPolicy> policy_;
  RetentionPolicy* retention_ = nullptr;  // policy_, once a block was retained; until then nobody pays for it
  EventRing events_;
  std::vector<Node> nodes_;
  std::vector<Sibling> siblings_;                         // by node
  TokenBlocks tokens_;                                    // by node
  std::vector<Part> parts_;                               // [node][window]
  std::vector<i64> cached_parts_;                         // by window
  std::vector<std::shared_ptr<const std::string>> tags_;  // by node, from the first one on that has any
  const std::shared_ptr<const std::string> no_tag_;
  std::vector<i32> root_of_;  // by node, where events are on: the number of its root, never given out twice
  i32 free_ = kNoNode;
  std::vector<i32> buckets_;
  std::unordered_map<i32, i32> pins_;                      // how many, of the nodes that have some
  std::unordered_map<std::string, i32, KeyedHash> roots_;  // by flat(key)
  std::unordered_map<i32, RootKey> root_keys_;             // by number
  // Roots that are gone, while an event that names them waits: each had one waiting when it went, so there are never
  // more than twice as many as events can wait.
  std::deque<i32> gone_roots_;
  RootKey* told_root_ = nullptr;  // of the number below: events come in runs of one root
  i32 told_number_ = -1;
  i32 roots_seen_ = 0;
  std::vector<std::uint64_t> ghosts_;  // keys given up, each at its own place
  std::vector<i32> loose_;             // unlinked or idle since the transaction began
  std::vector<Told> told_;
  std::size_t told_at_once_ = 1;  // by a record, at most: each group once, those of full attention together
  std::vector<i32> block_;        // tell() unpacks here
  const i64 least_nodes_;         // that are made room for at once
  i64 asides_ = 0, linked_ = 0, in_buckets_ = 0, cached_ = 0, pinned_ = 0, evicted_ = 0;
};

}  // namespace kvmem
