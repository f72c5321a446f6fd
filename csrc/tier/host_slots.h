// The slots of host memory in which blocks lie that the device has lost. A slot holds one block of one group, with the
// bytes as they were on the device: arena after arena. The owner of the content index decides what goes into a slot and
// how long it stays; who knows what the bytes mean (the keys) is outside of the core, and names a slot by its number
// and generation. The generation changes whenever a slot is given to other content, so an old name finds nothing.
//
// State of a slot: free; taken (it has content, and may be given to other content when none is free); or held (taken,
// and in use by a transfer, so that it is not given away). Slots are numbered group by group.
//
// Thread safety: every function REQUIRES the lock of the allocator's pool. The bytes are guarded by nothing: a thread
// touches those of slots that it holds.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/digest.h"
#include "base/types.h"
#include "eviction/retention.h"
#include "tier/content_ids.h"

namespace kvmem {

// Memory of the host, zeroed, in huge pages where the system gives them. Throws OutOfMemory where there are no
// addresses for it. Physical memory is taken when a page is first written.
class HostMemory {
 public:
  explicit HostMemory(i64 bytes);
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  char* data() const { return data_; }
  i64 bytes() const { return bytes_; }

 private:
  i64 bytes_;
  char* data_;
};

// What the order of eviction needs to know of a content.
struct SlotContent {
  std::uint64_t key = 0;     // identifies it; equal when the content comes again
  std::uint64_t parent = 0;  // the key of the content that it follows; 0 if it follows none
  Priority priority;
};

// A slot, and which content it is about.
struct SlotName {
  i64 slot = -1;
  i64 generation = 0;
};

class HostSlots {
 public:
  // `slot_bytes` and `counts`: of each group; a group with count 0 has no slots. `policy`: which slot is given to other
  // content first (eviction/policy.h).
  HostSlots(std::vector<i64> slot_bytes, const std::vector<i64>& counts, const std::string& policy);

  const std::shared_ptr<HostMemory>& memory() const { return memory_; }
  i64 groups() const { return static_cast<i64>(slot_bytes_.size()); }
  i64 slot_bytes(i64 group) const { return slot_bytes_[group]; }
  i64 first(i64 group) const { return first_[group]; }
  i64 count(i64 group) const { return first_[group + 1] - first_[group]; }
  i64 free_count(i64 group) const { return static_cast<i64>(free_[group].size()); }
  i64 offset(i64 slot) const {
    const i64 group = group_of(slot);
    return start_[group] + (slot - first_[group]) * slot_bytes_[group];
  }
  i64 group_of(i64 slot) const;

  // Gives a slot to new content: the one that has this content already, else a free one, else the policy's victim,
  // whose content is lost. Returns a name with slot -1 if all are held. May throw std::bad_alloc, and has changed
  // nothing then.
  SlotName take(i64 group, const SlotContent& content);
  // Undoes the latest take() that is neither undone nor confirmed: the slot has what it had before, under the old name,
  // since nothing writes to it before the transaction is executed. Only its place in the order of eviction is new,
  // because policies cannot undo the eviction of an id that is in use again. REQUIRES: `name` is of that call.
  void undo_take(const SlotName& name);
  // The takes until now are not undone any more.
  void confirm_takes() { takes_.clear(); }
  // The transaction that gave the slot away failed and was undone, but had begun to write: what the slot had is lost.
  void lose(i64 slot);
  // Counts the slots that lose() has emptied. Whoever names slots must ask has() when it changes.
  i64 lost() const { return lost_; }
  // Whether the slot still has the content that this name is about.
  bool has(const SlotName& name) const {
    return name.slot >= 0 && name.slot < static_cast<i64>(slots_.size()) && slots_[name.slot].taken &&
           slots_[name.slot].generation == name.generation;
  }
  // Keeps the slot from being given away until release(); calls nest. Returns false, and does nothing, unless has().
  bool hold(const SlotName& name);
  void release(const SlotName& name);  // REQUIRES: hold() was true
  // The slot's content, if it has any, was found and is used again; what the policy learns from.
  void hit(i64 slot) {
    if (slots_[slot].taken) order_of(slot).policy.hit(slots_[slot].id);
  }
  // How long the slot's content is retained; nothing is if it has none.
  Priority priority(i64 slot) const {
    const bool any = slot >= 0 && slot < first_.back() && slots_[slot].taken;
    return any ? orders_[group_of(slot)]->policy.priority(slots_[slot].id) : Priority{};
  }
  // Frees the slot. Does nothing unless has(); a held slot becomes free with its last release().
  void drop(const SlotName& name);
  void digest(Hasher& hash) const;  // without the order of eviction
  void check(std::vector<std::string>* out) const;

 private:
  struct Slot {
    i64 generation = 0;
    SlotContent content;
    i32 id = -1, parent_id = -1;  // of the content and of what it follows, among those of its group
    i32 holds = 0;
    bool taken = false, dropped = false;
  };
  struct Take {
    i64 slot;
    SlotContent before;
    bool taken;
  };
  // The order of eviction of one group's slots.
  struct Order {
    Order(i64 count, const std::string& name);
    ContentIds ids;
    std::vector<i64> slots;  // by id; -1 for a content that is not there, only others that follow it
    RetentionPolicy policy;
  };
  Order& order_of(i64 slot) { return *orders_[group_of(slot)]; }
  void enter(i64 slot, const SlotContent& content);
  void leave(i64 slot);
  void free(i64 slot);

  std::vector<i64> slot_bytes_, first_{0}, start_{0};  // by group, and one past the last
  std::vector<Slot> slots_;
  std::vector<std::vector<i64>> free_;          // by group; room for all of its slots
  std::vector<std::unique_ptr<Order>> orders_;  // by group
  std::vector<Take> takes_;                     // those that may be undone, the latest last
  i64 lost_ = 0;
  std::shared_ptr<HostMemory> memory_;
};

}  // namespace kvmem
