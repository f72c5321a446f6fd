// The order in which memory is reclaimed, written once. PageTable::reclaim() follows kReclaimOrder; each page table
// implements what it frees of each kind. Every request for the eviction policy's next victim goes through
// PageTable::evict_in_order().
#pragma once

#include <vector>

#include "index/prefix_index.h"
#include "memory/transaction.h"

namespace kvmem {

enum class Reclaim : std::uint8_t {
  idle,           // pages that neither sequences nor content need
  second_copies,  // content of which there is another copy
  victims,        // content, as the eviction policy names it
  snapshots,      // snapshots of tokens in use, and rows whose blocks are also in other rows
  out_of_window,  // second copies of what is out of window, although its node is in use
  ahead,          // what is mapped ahead of live sequences
};
// All kinds but the first may cost content, and follow only where the kinds before do not suffice.
constexpr Reclaim kReclaimOrder[] = {Reclaim::idle,      Reclaim::second_copies, Reclaim::victims,
                                     Reclaim::snapshots, Reclaim::out_of_window, Reclaim::ahead};

// What became of a victim.
enum class Outcome : std::uint8_t {
  evicted,  // the policy names the next one
  skipped,  // evicting it would free nothing that is wanted: the eviction order passes over it until the loop ends
  stop,     // the loop ends
};

// The items over which the eviction order passes for the time being.
class SkippedItems {
 public:
  SkippedItems(const PrefixIndex& index, i32 owner, Transaction& tx) : index_(index), owner_(owner), tx_(tx) {}
  bool full() const { return items_.size() >= kMost; }
  void add(Item x) {
    KVMEM_ASSERT(!full(), "the loop ends when it is full");
    items_.push_back(x);
    tx_.push({OpKind::aside, owner_, x.node, x.window});
  }
  // Restores the order. Must be called last; if an exception prevents that, undoing the transaction restores it.
  void restore() {
    for (auto x = items_.rbegin(); x != items_.rend(); ++x) {
      if (index_.is_skipped(*x)) tx_.push({OpKind::back, owner_, x->node, x->window});
    }
    items_.clear();
  }

 private:
  static constexpr std::size_t kMost = 1024;  // bounds the time of a call
  const PrefixIndex& index_;
  const i32 owner_;
  Transaction& tx_;
  std::vector<Item> items_;
};

}  // namespace kvmem
