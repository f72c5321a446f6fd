// The content index: a trie of full blocks of token ids. A node is one block after the blocks of its parent; the first
// blocks are children of a root, and there is one root for each (salt, extra key). So a path from a root is a prefix of
// some sequence. A node is found only by comparison of all its token ids, never by a digest alone (invariant 7), and
// nothing under one salt is ever found under another (invariant 9).
//
// Most blocks are the only child of their parent. So the newest child is found through the parent, and only its
// siblings through a hash table: the continuation of a sequence that was never forked reads the parent, the child and
// the child's tokens, and computes no hash.
//
// The index knows nothing of memory. A page table counts the copies of a node with add_copy() and drop_copy();
// sequences and pins count its users with acquire() and drop(). A node without a copy exists only while it is used, or
// as a step on the path to other nodes, as sliding windows leave behind.
//
// The unit of eviction is an Item: a whole node, or what one sliding-window group has of it (a part). A block may be
// out of window while its sequence goes on, so parts have a use count of their own (need(), unneed()). Parts and whole
// nodes share one eviction order, by when and how often each was used.
//
// Copies in tiers below the device are found by keys that are valid in every process (kvmem/tiers/keys.py), not here.
// Whoever knows the keys follows the index by a second queue of events, moves(), which also says which host slot has
// got the bytes of a block that was evicted.
//
// Functions with `undo` make a change (false), or undo the opposite change (true): add_copy(undo) undoes drop_copy(),
// and the eviction order is restored too. Changes are undone newest first.
#pragma once

#include <algorithm>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/check.h"
#include "base/digest.h"
#include "base/keyed_hash.h"
#include "base/types.h"
#include "eviction/retention.h"
#include "index/events.h"
#include "index/items.h"
#include "index/token_blocks.h"

namespace kvmem {

class PrefixIndex {
 public:
  // `groups`: the kind of each group. `hash_bits` below 64 makes hashes collide, for tests. `blocks`: about how many
  // blocks there is memory for; the tables are sized for as many, at most 65,536, so that later calls need not grow
  // them.
  // `move_capacity`: that of moves(), as event_capacity.
  PrefixIndex(i64 block_tokens, std::vector<GroupKind> groups, const std::string& policy, int hash_bits,
              i64 event_capacity, i64 move_capacity, i64 blocks);

  i64 block_tokens() const { return tokens_.block_tokens(); }
  i32 windows() const { return windows_; }  // the number of sliding-window groups
  bool whole() const { return whole_; }     // whether whole nodes are items; if not, only parts are
  // Conversions between a group and its number among the sliding-window groups (-1 for other groups).
  i32 window_of(i64 group) const { return window_of_[static_cast<std::size_t>(group)]; }
  i32 group_of(i32 window) const { return group_of_[static_cast<std::size_t>(window)]; }

  // --- lookup; no side effects ---
  i32 find_root(const PrefixKey& key) const;
  // Returns the child of `parent` with these block_tokens() tokens and this tag (block_tags.h; null for none), or
  // kNoNode.
  i32 find(i32 parent, const i32* tokens, const std::string* tag = nullptr) const;
  // Writes the children whose first tokens, but not all, match some of tokens [0, count): the longest match first, of
  // equal ones the oldest. Tokens from the first one on to which `tag` makes a difference do not match. Looks at the
  // newest kNewest children only: the prompts that end within one block may give it very many.
  void find_partial(i32 parent, const i32* tokens, i64 count, const std::string* tag,
                    std::vector<PartOfBlock>* found) const;
  // Returns true if the block was cached and evicted. `parent` is kNoNode for the first block under `key`, whose root
  // need not exist. Remembers the latest 16,384 evictions at most; wrong with probability 2^-64.
  bool was_evicted(i32 parent, const PrefixKey& key, const i32* tokens, const std::string* tag) const;
  // Returns true if some child of `parent` has these tokens under another tag, with memory. REQUIRES: find() found
  // none.
  bool has_other_tag(i32 parent, const i32* tokens) const;
  const std::shared_ptr<const std::string>& tag(i32 node) const { return tags_.empty() ? no_tag_ : tags_[node]; }
  // Returns the length in blocks of the longest chain of these tokens under another root. Looks at kCandidates roots.
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
  i32 copies(i32 node) const { return nodes_[node].copies; }
  // Writes the first `count` tokens.
  void copy_tokens(i32 node, i64 count, i32* out) const { tokens_.copy(node, count, out); }
  // Whether the window group has a copy of the node, how many, and how many sequences and pins need it.
  bool has_window(i32 node, i32 window) const { return part(node, window).copies > 0; }
  i32 window_copies(i32 node, i32 window) const { return part(node, window).copies; }
  i32 needs(i32 node, i32 window) const { return part(node, window).needs; }
  // Return a child without users, and a later sibling of `node` without users; kNoNode if there is none. Windows may
  // have no copy of it.
  i32 unused_child(i32 node) const { return first_unused(nodes_[node].first_child); }
  i32 unused_sibling(i32 node) const { return first_unused(nodes_[node].next_child); }
  // Returns whether f() is true for all children with a copy.
  template <class F>
  bool all_cached_children(i32 node, F f) const {
    for (i32 x = nodes_[node].first_child; x != kNoNode; x = nodes_[x].next_child) {
      if (nodes_[x].copies > 0 && !f(x)) return false;
    }
    return true;
  }
  i64 capacity() const { return static_cast<i64>(nodes_.size()); }  // node ids are below it

  // --- state that transactions change and undo ---
  // Makes room for the changes of one op, before the first of them; may throw std::bad_alloc. Neither these changes nor
  // their undoing needs memory then.
  void expect_change() {
    expect_copies();
    if (loose_.size() == loose_.capacity()) grow_lists();
  }
  // The same for an op that only adds copies.
  void expect_copies() {
    if (watched_ && changes_.capacity() - changes_.size() < changes_per_op_) grow_lists();
  }
  // add_copy() counts one more copy of the node, drop_copy() one fewer: in group `group`, or, with -1, in all
  // full-attention groups at once.
  void add_copy(i32 node, i64 group, bool undo);
  void drop_copy(i32 node, i64 group, bool undo);
  // The same for the copies that a sliding-window group has.
  void add_window_copy(i32 node, i32 window, bool undo);
  void drop_window_copy(i32 node, i32 window, bool undo);
  // Records that a host slot has got the group's bytes of the node.
  void note_kept(i32 node, i64 group, i64 slot, i64 generation, bool undo) {
    note({node, static_cast<i32>(group), EventKind::kept, static_cast<i32>(slot), static_cast<i32>(generation)}, undo);
  }
  // Records that the new node leads to others, whether it gets a copy or not, before any change of the transaction:
  // events of those others name it.
  void note_path(i32 node) {
    expect_change();
    note({node, kPath, EventKind::stored}, false);
  }
  // need() counts one more sequence or pin that needs the window group's part of the node, unneed() one fewer.
  void need(i32 node, i32 window, bool undo = false) {
    Part& p = part(node, window);
    KVMEM_ASSERT(p.needs >= 0, "needs are counted");
    if (p.needs++ == 0 && p.copies > 0) need_again(node, window, undo);
  }
  void unneed(i32 node, i32 window, bool undo) {
    Part& p = part(node, window);
    KVMEM_ASSERT(p.needs > 0, "the part is needed");
    if (--p.needs == 0 && p.copies > 0) need_no_more(node, window, undo);
  }
  // Records that the state groups have a snapshot of the node, or no longer have it, where add_copy() does not imply
  // that.
  void note_state(i32 node, bool stored, bool undo);
  // Ends a transaction: removes nodes without copy and users, and publishes its events if it was committed.
  void finish(bool committed) {
    if (!changes_.empty() || !loose_.empty()) finish_changes(committed);
  }
  i64 aged() const { return policy_->aged(); }

  // --- use ---
  // Returns the root of `key`, with one more user; makes it if there is none, which `*made` reports. May throw
  // std::bad_alloc, and has changed nothing then.
  i32 open_root(const PrefixKey& key, bool* made);
  // Returns a new child. REQUIRES: find() found none. It has no users, and finish() removes it if it has got no copy
  // and no user by then. May throw std::bad_alloc, and has changed nothing then.
  i32 add(i32 parent, const i32* tokens, const std::string* tag = nullptr);
  // Undo open_root(); and acquire(), or add() with acquire(). Everything is as before, including the eviction order and
  // the order in which nodes are allocated. From here on no function of this section throws, except where it says so.
  void unopen_root(i32 root, bool made);
  void undo_acquire(i32 node);
  // A hint that acquire() or drop() of this node will follow. In a chain each node is found through the next, so the
  // processor would wait for one cache miss after another; a caller that knows all nodes prefetches them first.
  void prefetch(i32 node) const {
    __builtin_prefetch(nodes_.data() + node, 1);
    if (whole_) policy_->prefetch(item(node));
  }
  // Counts one more user.
  void acquire(i32 node) {
    KVMEM_ASSERT(nodes_[node].ordinal >= -1, "the node exists");
    Node& n = nodes_[node];
    if (n.users++ == 0 && n.released) use_again(node);
  }
  // Counts one user fewer. Of a chain, the last block is left first.
  void drop(i32 node) {
    KVMEM_ASSERT(nodes_[node].users > 0, "the node is used");
    if (--nodes_[node].users == 0) drop_last(node);
  }
  // Tell the policy that a new sequence reuses the node or the part, or something that continues it.
  void hit(i32 node) {
    if (nodes_[node].copies > 0 && whole_) policy_->hit(item(node));
  }
  void hit_window(i32 node, i32 window) {
    if (part(node, window).copies > 0) policy_->hit(item(node, window));
  }
  void pin(i32 node);  // may throw std::bad_alloc
  void unpin(i32 node);
  // Undoes the pins, just made, of the nodes from `last` towards the root, before `end`.
  void undo_pins(i32 last, i32 end);
  // Required before the first retain(). May throw std::bad_alloc.
  void expect_retention() {
    if (!retention_) start_retention();
  }
  // Sets a retention priority for each item of the node that has memory.
  void retain(i32 node, int priority, double seconds);
  // The same for one item that has memory; and what retain() has set of it.
  void retain(Item x, const Priority& priority) { retention_->retain(id_of(x), priority.level, priority.seconds); }
  Priority priority(Item x) const { return retention_ ? retention_->priority(id_of(x)) : Priority{}; }

  // Returns the item to evict next, with node kNoNode if there is none.
  Item victim() { return item_of(policy_->victim()); }
  // skip_item() makes victim() pass over an item; unskip() restores its position in the eviction order. Items are put
  // back in reverse order. REQUIRES: in between, the item is neither used nor evicted.
  bool is_skipped(Item x) const {
    return skipped_ > 0 && (x.window < 0 ? nodes_[x.node].aside : part(x.node, x.window).aside);
  }
  i64 skipped_count() const { return skipped_; }
  void skip_item(Item x);
  void unskip(Item x);
  // The number of unreferenced blocks with memory: nodes, or parts of the first window where only windows have memory.
  i64 cached() const { return whole_ ? cached_ : cached_parts_[0]; }
  // The number of unreferenced parts of the window group.
  i64 cached(i32 window) const { return cached_parts_[static_cast<std::size_t>(window)]; }
  bool empty() const { return linked_ == 0; }
  i64 pinned_count() const { return pinned_; }
  i64 evicted() const { return evicted_; }  // nodes evicted since the start
  EventRing& events() { return events_; }
  EventRing& moves() { return moves_; }
  std::uint64_t key(i32 node) const { return nodes_[node].key; }
  // Returns the salt and extra key of the root that events call `number`. Throws SpecError once the root is gone, no
  // waiting event names it, and prune_roots() was called.
  const PrefixKey& root_key(i32 number) const;
  void prune_roots();
  std::vector<i32> roots() const;
  // Returns all descendants of `root`, a parent before its children.
  std::vector<i32> below(i32 root) const;
  i32 root_number(i32 node) const { return root_of_[node]; }  // REQUIRES: events are on
  void check(const std::vector<i32>& users, std::vector<std::string>* out) const;
  void digest(Hasher& hash) const;  // prefix_find.cpp

  static constexpr i64 kCandidates = 32, kNewest = 8;

 private:
  // Half a cache line, so that each call touches one line for each node.
  struct alignas(32) Node {
    std::uint64_t key = 0;  // hash of the root's key and of all tokens from the start to the end of this block
    i32 parent = kNoNode, ordinal = -1;
    i32 first_child = kNoNode;  // the newest child; next_child links to the older ones
    i32 next_child = kNoNode;   // of a root, which has no siblings: its number; of a free node: the next free one
    i32 users = 0;
    std::uint32_t copies : 27;
    std::uint32_t linked : 1;    // can be found
    std::uint32_t released : 1;  // has a copy and no users, so the policy may return it as a victim
    std::uint32_t pinned : 1;
    std::uint32_t aside : 1;
    std::uint32_t added : 1;  // the current transaction made it
    Node() : copies(0), linked(0), released(0), pinned(0), aside(0), added(0) {}
  };
  static_assert(sizeof(Node) == 32, "two nodes fill a cache line");
  // Hash-table links of a node that is not the newest child of its parent.
  struct Sibling {
    i32 next_in_bucket, previous_child;
  };
  // The part of a node that a sliding-window group has.
  struct Part {
    i32 copies = 0, needs = 0;
    bool aside = false;
  };
  static constexpr i32 kPath = -2;  // in place of a group
  struct Change {
    i32 node;
    i32 group;       // -1: all full-attention groups
    EventKind kind;  // stored, removed or kept
    i32 slot = -1, generation = -1;
  };
  struct RootKey {
    PrefixKey key;
    std::string flat;
    i64 last_event = 0, last_move = 0;  // the serials of the last records that name it, in both queues
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
  // Returns true if a group has memory of the node.
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
  // The ids of items in the policy: for each node first the whole node, then its parts.
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
  void drop_last(i32 node);
  bool idle(const Node& n) const { return n.users == 0 && n.copies == 0 && n.first_child == kNoNode; }
  void prune(i32 node, bool evicted = false);
  void remember(std::uint64_t key) { ghosts_[key & (ghosts_.size() - 1)] = key; }
  void note(const Change& change, bool undo) {
    if (!watched_) return;
    KVMEM_ASSERT(undo ? changes_.back().node == change.node : changes_.size() < changes_.capacity(),
                 "expect_change() made room, and changes are undone newest first");
    undo ? changes_.pop_back() : changes_.push_back(change);
  }
  [[gnu::cold, gnu::noinline]] void grow_lists();
  void finish_changes(bool committed);
  void publish(const Change& change);
  void note_root(i32 number);
  void drop_root(i32 number);
  bool is_waiting(const RootKey& root) const {
    return root.last_event > events_.serial() - events_.size() || root.last_move > moves_.serial() - moves_.size();
  }

  std::vector<i32> full_groups_, state_groups_, window_of_, group_of_;
  i32 windows_ = 0;
  bool whole_ = true;         // whole nodes are items: some group holds every token, or snapshots
  i32 items_ = 1;             // items of each node
  const std::uint64_t mask_;  // limits the bits of keys that are compared, for tests
  std::uint64_t seed_;
  std::unique_ptr<EvictionPolicy> policy_;
  RetentionPolicy* retention_ = nullptr;  // policy_, once a block was retained; costs nothing before
  EventRing events_, moves_;
  const bool watched_;  // one of them is on
  std::vector<Node> nodes_;
  std::vector<Sibling> siblings_;                         // by node
  TokenBlocks tokens_;                                    // by node
  std::vector<Part> parts_;                               // [node][window]
  std::vector<i64> cached_parts_;                         // by window
  std::vector<std::shared_ptr<const std::string>> tags_;  // by node; empty until the first node that has one
  const std::shared_ptr<const std::string> no_tag_;
  std::vector<i32> root_of_;  // by node, if events or moves are on: the number of its root, which is never used twice
  i32 free_ = kNoNode;
  std::vector<i32> buckets_;
  std::unordered_map<i32, i32> pins_;                      // the number of pins, of nodes that have any
  std::unordered_map<std::string, i32, KeyedHash> roots_;  // by flat(key)
  std::unordered_map<i32, RootKey> root_keys_;             // by number
  // Roots that are gone but that a waiting event names. Each had a waiting event when it went, so there are at most
  // twice as many as events can wait.
  std::deque<i32> gone_roots_;
  RootKey* recent_root_ = nullptr;  // of the number below: events come in runs of one root
  i32 recent_number_ = -1;
  i32 roots_seen_ = 0;
  std::vector<std::uint64_t> ghosts_;  // keys of evicted blocks: a direct-mapped table
  std::vector<i32> loose_;             // nodes added, or without a copy, since the transaction began
  std::vector<Change> changes_;
  std::size_t changes_per_op_ = 1;  // at most: one for each group, but one for all full-attention groups together
  std::vector<i32> block_;          // publish() unpacks tokens here
  const i64 least_nodes_;           // nodes by which the tables grow at least
  i64 skipped_ = 0, linked_ = 0, in_buckets_ = 0, cached_ = 0, pinned_ = 0, evicted_ = 0;
};

}  // namespace kvmem
