// What a router outside should know about cached blocks: which are stored, which are gone. Records wait in a ring until
// somebody fetches them; nobody is called, nothing is hashed and nothing is allocated when a record is made.
//
// A consumer that missed one record knows nothing for sure any more: of the rest, every second record would name a
// block it never heard of. So when the ring is full, all that waits is dropped at once, and nothing more is kept until
// the consumer comes back. It then gets `cleared`, and `stored` for all that is resident at that moment: a state that
// is right, at a cost it would have had anyway. The same serves a consumer that comes late or wants to start over.
//
// Not thread-safe: the lock that serialises changes of the index serialises these calls too.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/types.h"

namespace kvmem {

using Tag = std::shared_ptr<const std::string>;  // block_tags.h; null for none

enum class EventKind : std::int8_t { stored, removed, cleared };

// Records in order, field by field, and the walk over what is resident writes itself down here too.
struct EventRecords {
  // As EventRing::stored().
  void stored(i32 node, i32 parent, i32 root, i32 group, i32 ordinal, const i32* block, i32 tier = 0, Tag tag = {});
  i64 size() const { return static_cast<i64>(kinds.size()); }

  i64 block_tokens = 0;
  std::vector<std::int8_t> kinds;  // EventKind
  std::vector<i32> nodes, parents, roots, groups, ordinals, tiers;
  std::vector<i32> tokens;  // of the stored records alone, `block_tokens` each
  std::vector<Tag> tags;    // and of those
};

class EventRing {
 public:
  // Walks over all nodes, a parent before its children, and calls stored() for every group and tier that holds the
  // node; for a node that no group holds, but nodes that continue it are held, once with group -1.
  using Resident = std::function<void(EventRecords&)>;

  // All memory is taken here: a record costs 32 + 4 * block_tokens bytes. Capacity 0: off, every call does nothing.
  EventRing(i64 capacity, i64 block_tokens);
  bool on() const { return capacity_ > 0; }

  // `group` holds the block of `node` now. `parent` is the node before it in its chain and was stored before, whether
  // or not it still is; -1 for the first block, whose chain begins at `root`. `ordinal` counts the blocks before it.
  // `tokens`: its block_tokens ids, copied. A node no group holds, but which others continue, is stored with group -1.
  void stored(i32 node, i32 parent, i32 root, i32 group, i32 ordinal, const i32* tokens, i32 tier = 0,
              Tag tag = {}) noexcept;
  // `group` holds it no more. The id may stand for another block from the next stored() on.
  void removed(i32 node, i32 group, i32 tier = 0) noexcept;
  // No group holds any block.
  void cleared() noexcept;

  // Takes out the oldest records, `max` at most (-1: all). After a loss, or with `restart`, instead: `cleared` and all
  // that `resident` walks over, whatever `max` is. When this throws, nothing was taken out.
  EventRecords drain(i64 max, const Resident& resident, bool restart = false);
  // Takes the latest drain() back; nothing was recorded since.
  void undo_drain() { first_ = drained_.first, size_ = drained_.size, broken_ = drained_.broken; }

  i64 block_tokens() const { return block_tokens_; }
  i64 size() const { return size_; }      // waiting
  i64 serial() const { return serial_; }  // records ever made, the lost ones too
  i64 lost() const { return lost_; }      // dropped for lack of room

 private:
  struct Record {
    EventKind kind;
    i32 node, parent, root, group, ordinal, tier;
    Tag tag;
  };
  void push(Record&& record, const i32* tokens) noexcept;
  void append_to(EventRecords& out, i64 place) const;

  const i64 capacity_, block_tokens_;
  std::vector<Record> records_;
  std::vector<i32> tokens_;  // by place in records_
  i64 first_ = 0, size_ = 0, serial_ = 0, lost_ = 0;
  bool broken_ = false;  // something was lost, and the consumer does not know yet
  struct {
    i64 first = 0, size = 0;
    bool broken = false;
  } drained_;  // what drain() found
};

}  // namespace kvmem
