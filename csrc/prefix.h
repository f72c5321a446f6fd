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
// sequences and pins tell it with enter() and leave() whether they use it. A node with memory that nobody uses is
// cached, and its EvictionPolicy says which of those goes next. A node without memory stays only as a step on the path
// to others (sliding windows leave such) or while it is used.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "digest.h"
#include "events.h"
#include "retention.h"
#include "token_blocks.h"
#include "types.h"

namespace kvmem {

constexpr i32 kNoNode = -1;

// A content and what it may be shared with. Both are compared byte for byte.
struct PrefixKey {
  std::string salt, extra_key;
};

// The first tokens of a cached block.
struct PartOfBlock {
  i32 node;
  i64 tokens;
};

class PrefixIndex {
 public:
  // `token_groups`: the groups that events speak of. `hash_bits` under 64 makes hashes collide, for tests.
  // `blocks`: about how many there is memory for. Tables are made for as many at once, up to some 65,000, so that no
  // call later pays for their growth.
  PrefixIndex(i64 block_tokens, std::vector<i32> token_groups, const std::string& policy, int hash_bits,
              i64 event_capacity, i64 blocks);

  i64 block_tokens() const { return tokens_.block_tokens(); }

  // --- finding; no side effect ---
  i32 find_root(const PrefixKey& key) const;
  // The child of `parent` that holds these block_tokens() tokens.
  i32 find(i32 parent, const i32* tokens) const;
  // The children that begin with some of tokens [0, count), but not all of their own: those with most of them first, of
  // equal ones the oldest. Of many children it looks at the newest kNewest: those of a prompt that ends within a block
  // all begin with its rest.
  void find_partial(i32 parent, const i32* tokens, i64 count, std::vector<PartOfBlock>* found) const;
  // True if the block was known and its memory given up; `parent` kNoNode for the first block under `key`, whose root
  // may be gone. Remembers some thousands, and errs at 2^-64 a question.
  bool was_evicted(i32 parent, const PrefixKey& key, const i32* tokens) const;
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
  // A cached child that nobody uses, kNoNode if there is none.
  i32 unused_child(i32 node) const;
  i64 capacity() const { return static_cast<i64>(nodes_.size()); }  // ids are below it

  // --- state: what transactions change and take back ---
  // The node's tokens lie in one more place, or one fewer: of this group, or (-1) of all of them alike.
  // expect_change() comes before each, and may find no memory; these then need none, and neither does taking them back.
  void expect_change();
  void place(i32 node, i64 group, bool undo);
  void displace(i32 node, i64 group, bool undo);
  // The end of a transaction: nodes without memory and use are gone now, and events are told.
  void finish(bool committed);

  // --- use ---
  // Counts one user; makes the root where there is none. May find no memory, and has changed nothing then. `*made`:
  // whether it did.
  i32 open_root(const PrefixKey& key, bool* made);
  // A child that find() did not find; without users, and gone at finish() if it got no place. As open_root().
  i32 add(i32 parent, const i32* tokens);
  // These take back open_root() and enter(), or add() with enter(), in reverse order: all is as before them, the order
  // in which blocks are given up and nodes are made included. What follows here cannot fail.
  void unopen_root(i32 root, bool made);
  void unenter(i32 node);
  // enter() or leave() of this node will follow. Of a chain each is found through the one behind it, so that a
  // processor would wait for one after the other; who knows them all by another way says so before.
  void prefetch(i32 node) const {
    __builtin_prefetch(nodes_.data() + node, 1);
    policy_->prefetch(node);
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
    if (nodes_[node].places > 0) policy_->hit(node);
  }
  void pin(i32 node);  // may find no memory
  void unpin(i32 node);
  void undo_pins(i32 last, i32 end);  // of the nodes from `last` to before `end`, towards the root, just pinned
  // retain() may come from now on. May find no memory.
  void expect_retention() {
    if (!retention_) start_retention();
  }
  // Of a block that a sliding window has passed there is nothing to keep.
  void retain(i32 node, int priority, double seconds) {
    if (nodes_[node].places == 0) return;
    retention_->retain(node, priority, seconds);
  }

  i32 victim() { return policy_->victim(); }  // the cached node to give up next, kNoNode if there is none
  i64 cached() const { return cached_; }      // nodes with memory that nobody uses
  bool empty() const { return linked_ == 0; }
  i64 pinned_count() const { return pinned_; }
  i64 evicted() const { return evicted_; }  // nodes that lost their memory, ever
  EventRing& events() { return events_; }
  // The salt and extra key of the root that events call `number`; it stays known until forget_roots().
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
    std::uint32_t places : 29;
    std::uint32_t linked : 1;    // can be found
    std::uint32_t released : 1;  // its policy may name it
    std::uint32_t pinned : 1;
    Node() : places(0), linked(0), released(0), pinned(0) {}
  };
  // Of a node that is not the newest child of its parent.
  struct Sibling {
    i32 next_in_bucket, previous_child;
  };
  struct Told {
    i32 node;
    i32 group;
    bool stored;
  };
  struct RootKey {
    PrefixKey key;
    std::string flat;
    bool gone = false;
  };

  static std::string flat(const PrefixKey& key);
  std::uint64_t root_hash(const PrefixKey& key) const;
  std::uint64_t key_after(std::uint64_t before, const i32* tokens) const;
  i32& bucket(std::uint64_t key) { return buckets_[key & mask_ & (buckets_.size() - 1)]; }
  i32 bucket(std::uint64_t key) const { return buckets_[key & mask_ & (buckets_.size() - 1)]; }
  i32 find_sibling(i32 parent, const i32* tokens) const;
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
  void forget_root(i32 root);
  void use_again(i32 node);
  void leave_last(i32 node);
  bool idle(const Node& n) const { return n.users == 0 && n.places == 0 && n.first_child == kNoNode; }
  void prune(i32 node);
  void note(const Told& told, bool undo);
  void tell(const Told& told);

  const std::vector<i32> token_groups_;
  const std::uint64_t mask_;  // of keys, for tests
  std::uint64_t seed_;
  std::unique_ptr<EvictionPolicy> policy_;
  RetentionPolicy* retention_ = nullptr;  // policy_, once a block was retained; until then nobody pays for it
  EventRing events_;
  std::vector<Node> nodes_;
  std::vector<Sibling> siblings_;  // by node
  TokenBlocks tokens_;             // by node
  std::vector<i32> root_of_;       // by node, where events are on: the number of its root, never given out twice
  i32 free_ = kNoNode;
  std::vector<i32> buckets_;
  std::unordered_map<i32, i32> pins_;           // how many, of the nodes that have some
  std::unordered_map<std::string, i32> roots_;  // by flat(key)
  std::unordered_map<i32, RootKey> root_keys_;  // by number
  i32 roots_seen_ = 0;
  std::vector<std::uint64_t> ghosts_;  // keys given up, each at its own place
  std::vector<i32> loose_;             // unlinked or idle since the transaction began
  std::vector<Told> told_;
  std::vector<i32> block_;  // tell() unpacks here
  i64 linked_ = 0, in_buckets_ = 0, cached_ = 0, pinned_ = 0, evicted_ = 0;
};

}  // namespace kvmem
