// Cache events for a router outside of the process: which blocks were stored, and which were removed. Records wait in a
// ring until the consumer fetches them. Making a record calls no function of the consumer, computes no hash and
// allocates no memory.
//
// A consumer that missed one record can trust none of what it knows, because later records may name a block that it
// never heard of. So when the ring is full, all waiting records are dropped, and no more are stored until the consumer
// fetches again. It then gets `cleared`, and `stored` for each resident block: a correct state. The same serves a
// consumer that starts late or wants to start over.
//
// Not thread-safe: callers hold the lock that guards the index.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/types.h"

namespace kvmem {

using Tag = std::shared_ptr<const std::string>;  // block_tags.h; null for none

// `kept`: the bytes of a block lie in a host slot from now on; for tiers only.
enum class EventKind : std::int8_t { stored, removed, cleared, kept };

// Records in order, as columns. The walk over resident blocks writes the same form.
struct EventRecords {
  // Appends a record, as EventRing::stored().
  void stored(i32 node, i32 parent, i32 root, i32 group, i32 ordinal, const i32* block, i32 tier = 0, Tag tag = {});
  i64 size() const { return static_cast<i64>(kinds.size()); }

  i64 block_tokens = 0;
  std::vector<std::int8_t> kinds;  // EventKind
  std::vector<i32> nodes, parents, roots, groups, ordinals, tiers;
  std::vector<i32> tokens;  // of stored records only: `block_tokens` ids for each
  std::vector<Tag> tags;    // of stored records only
};

class EventRing {
 public:
  // A function that calls stored() for every resident node, a parent before its children: once for each group and tier
  // that has the node; and once, with group -1, for a node that no group has but that has resident descendants.
  using Resident = std::function<void(EventRecords&)>;

  // Allocates the whole ring: 32 + 4 * block_tokens bytes for each record. With capacity 0 events are off, and every
  // call does nothing. Throws SpecError for a negative or too large capacity.
  EventRing(i64 capacity, i64 block_tokens);
  bool on() const { return capacity_ > 0; }

  // Records that `group` has the block of `node` now. `parent` is the node before it in its chain, which was stored
  // earlier but may be gone; -1 for the first block. The chain begins at root number `root`, and `ordinal` counts the
  // blocks before this one. `tokens`: its block_tokens ids, which are copied. Group -1: no group has the node, but
  // nodes that continue it are resident.
  void stored(i32 node, i32 parent, i32 root, i32 group, i32 ordinal, const i32* tokens, i32 tier = 0,
              Tag tag = {}) noexcept;
  // Records that `group` no longer has the node. The id may stand for another block from the next stored() on.
  void removed(i32 node, i32 group, i32 tier = 0) noexcept;
  // Records that host slot `slot`, in this generation, has the group's bytes of the node.
  void kept(i32 node, i32 group, i32 slot, i32 generation) noexcept;
  // Records that no group has any block.
  void cleared() noexcept;

  // Removes and returns the oldest records, `max` at most (-1: all). After a loss, or with `restart`, returns `cleared`
  // and the records of `resident` instead, whatever `max` is. Removes nothing if it throws.
  EventRecords drain(i64 max, const Resident& resident, bool restart = false);
  // Undoes the latest drain(). REQUIRES: nothing was recorded since.
  void undo_drain() { first_ = drained_.first, size_ = drained_.size, broken_ = drained_.broken; }

  i64 block_tokens() const { return block_tokens_; }
  i64 size() const { return size_; }      // records that wait
  i64 serial() const { return serial_; }  // records ever made, including the lost ones
  i64 lost() const { return lost_; }      // records dropped for lack of room

 private:
  struct Record {
    EventKind kind;
    i32 node, parent, root, group, ordinal, tier;
    Tag tag;
  };
  void push(Record&& record, const i32* tokens) noexcept;
  void append_to(EventRecords& out, i64 index) const;

  const i64 capacity_, block_tokens_;
  std::vector<Record> records_;
  std::vector<i32> tokens_;  // by index in records_
  i64 first_ = 0, size_ = 0, serial_ = 0, lost_ = 0;
  bool broken_ = false;  // records were lost, and the consumer does not know it yet
  struct {
    i64 first = 0, size = 0;
    bool broken = false;
  } drained_;  // the state before the latest drain()
};

}  // namespace kvmem
