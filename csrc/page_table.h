// What a backend is: the page table that says where a sequence's tokens lie. Two implementations, virtual_table (the
// MMU holds the table: a row of addresses per sequence) and paged_table (kernels read it: a list of blocks per
// sequence). Everything else (lengths, transactions, batches, accounting) is written once, in cache.cpp.
//
// Functions that take a Transaction only push records; the state changes in on_map, on_unmap, on_content and apply. Of
// two kinds there are many in a step (hold, show): whoever decides them changes the state and notes the record.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "batch.h"
#include "geometry.h"
#include "pages.h"
#include "prefix.h"
#include "sequences.h"
#include "transaction.h"

namespace kvmem {

// Memory that holds the start of a chain of cached blocks.
struct Found {
  i64 tokens = 0;  // how many tokens of the chain are all there, in every group
  i64 row = -1;    // virtual: the row that shows them
};

// Block `ordinal` of the sequence at `index` holds what the node says.
struct Published {
  i64 index, ordinal;
  i32 node;
};

class PageTable : public PageOwner {
 public:
  // True if tokens [0, tokens) of the group have room already: nothing to decide, no driver call.
  bool has_room(i64 index, i64 group, i64 tokens) {
    i64& ready = ready_tokens_[index * groups_ + group];
    return tokens <= ready || tokens <= (ready = find_room(index, group));
  }
  // Makes room for tokens [old_tokens, new_tokens), copying the tail first where it is shared.
  virtual void grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) = 0;
  // The length is about to become `new_tokens`; what lies behind may go.
  virtual void shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) = 0;
  // Tokens before `first` are no longer needed (a sliding window has passed them).
  virtual void drop_front(i64 index, i64 group, i64 old_first, i64 first, Transaction& tx) = 0;
  // Gives `child` (which holds nothing) the first `tokens` tokens of `parent`: whole shared pieces plus a copied tail.
  virtual void share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) = 0;
  // --- content (prefix.h): a chain is a list of nodes, one for each block from the first token on ---
  // How much of the first `tokens` tokens of the chain a new sequence could take over. The last node may count in part,
  // and then what is found ends there or at a whole block.
  virtual Found find(const std::vector<i32>& chain, i64 tokens) const = 0;
  // Gives a sequence that holds nothing what was found; its lengths and fronts say so already. All nodes are in use.
  virtual void adopt(i64 index, const std::vector<i32>& chain, const Found& found, Transaction& tx) = 0;
  // True if the group has the node's tokens somewhere.
  virtual bool has(i32 node, i64 group) const = 0;
  virtual void publish(const std::vector<Published>& blocks, Transaction& tx) = 0;
  // The last block that the sequence has published is its own again, to be written over.
  virtual void retract(i64 index, i32 node, Transaction& tx) = 0;
  // Gives up a node that nobody uses and that no cached one continues. Its memory is parked then.
  virtual void evict(i32 node, Transaction& tx) = 0;
  // A user has left the node, and others remain: what of it none of them holds may be given up from now on.
  virtual void offer(i32 node) = 0;
  // Keeps a copy of the sequence's fixed state with the last node of its chain.
  virtual void snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) = 0;
  // The sequence ends; its lengths are about to become 0.
  virtual void close(i64 index, Transaction& tx) = 0;
  // Makes sure that blocks 0 and 1 (kReadTrash, kWriteTrash) of a group exist.
  virtual void back_trash(i64 group, Transaction& tx) = 0;
  virtual bool has_trash(i64 group) const = 0;
  // Room beyond the length that can be prepared in the background, best effort. False when nothing is to be done.
  virtual bool map_ahead(i64 index, i64 group, i64 tokens, Transaction& tx) = 0;
  // The records of the transaction that map_ahead filled are executed once job `job` is done.
  virtual void set_pending(i64 index, i64 job) = 0;
  virtual i64 pending(i64 index) const = 0;

  virtual void apply(const Op& op, bool undo) = 0;  // bind, unbind, block
  // The length has become less by another's decision: whether the tail is shared is to be seen before the next write.
  virtual void look_at_tail(i64 index, i64 group) = 0;
  // True if the mappings around those of `op` are as between calls: no holes, arenas in step.
  virtual bool is_whole(const Op& op) const = 0;
  // The pages or blocks that token `token` of the sequence lies in, by arena: -1 for those that are its own.
  virtual std::vector<i64> shared_pieces(i64 index, i64 group, i64 token) const = 0;
  // True if what the group's lengths speak of is there. Cost grows with the longest sequence there can be.
  virtual bool holds(i64 index, i64 group) const = 0;
  // Where a token of a sequence lies: bytes from the start of the group's a-th arena.
  virtual i64 offset_bytes(i64 index, i64 group, i64 a, i64 token) const = 0;
  virtual TableView view(i64 group) const = 0;
  // How many leading whole blocks of two sequences are the same memory, and committed in both; the first `known` are
  // known to be. 0 where a window has dropped the front of one. Cost: a comparison for each further page or block.
  virtual i64 common_blocks(i64 a, i64 b, i64 group, i64 known) const = 0;
  // A number that sequences with this committed block in common agree on; others may.
  virtual i64 block_key(i64 index, i64 group, i64 block) const = 0;
  // The most tokens one sequence could grow to with `pages` more pages (an answer for error messages).
  virtual i64 tokens_that_fit(i64 index, i64 group, i64 pages) const = 0;
  // Bytes of live tokens, padding included, each physical byte once; and physical bytes with more than one user.
  virtual void count_bytes(i64* used_bytes, i64* shared_bytes) const = 0;
  virtual i64 first_arena(i64 group) const = 0;
  // Slots of an arena up to and including the last mapped one: what a default tensor shows.
  virtual i64 mapped_extent_slots(i64 group, i64 arena_in_group) const = 0;
  virtual void check(std::vector<std::string>* out) const = 0;

  void digest(Hasher& hash) const override { index_.digest(hash); }

  // Evicts a node and all cached ones that continue it, ends first: nobody could find those without it.
  void forget(i32 node, Transaction& tx);

 protected:
  PageTable(PrefixIndex& index, const Geometry& geometry)
      : index_(index),
        groups_(static_cast<i64>(geometry.groups.size())),
        ready_tokens_(geometry.max_sequences * groups_, 0) {}
  // How many tokens have room; 0 where something is to be done before the next token, whatever there is.
  virtual i64 find_room(i64 index, i64 group) = 0;
  // Called wherever find_room() might answer less than it did.
  void forget_room(i64 index, i64 group) { ready_tokens_[index * groups_ + group] = 0; }

  PrefixIndex& index_;
  const i64 groups_;

 private:
  std::vector<i64> ready_tokens_;  // [sequence][group]: what find_room() said; derived
};

std::unique_ptr<PageTable> make_virtual_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences,
                                              PrefixIndex& index);
std::unique_ptr<PageTable> make_paged_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences,
                                            PrefixIndex& index);

}  // namespace kvmem
