// What is reclaimed first, written once. PageTable::reclaim() goes along the order below; a page table says what it
// gives of each kind. Whatever asks the eviction policy for its next item does so through PageTable::evict_in_order().
#pragma once

#include <vector>

#include "index/prefix_index.h"
#include "memory/transaction.h"

namespace kvmem {

enum class Reclaim : std::uint8_t {
  idle,           // pages that neither sequences nor content need
  second_copies,  // content that lies elsewhere as well
  victims,        // content, as the eviction policy names it
  spares,         // snapshots of tokens in use, and rows whose blocks sequences hold as well
  out_of_window,  // what a window needs no more, though its node is in use
  ahead,          // what is mapped ahead of live sequences
};
// Content is reclaimed only where pages without any do not suffice: that is all but the first.
constexpr Reclaim kReclaimOrder[] = {Reclaim::idle,   Reclaim::second_copies, Reclaim::victims,
                                     Reclaim::spares, Reclaim::out_of_window, Reclaim::ahead};

// What becomes of an item that the policy has named.
enum class Named : std::uint8_t {
  evicted,  // and the policy names another one
  aside,    // evicting it would free nothing that is asked for: the order passes over it until the end
  last,     // no further item is asked for
};

// Items that the eviction order passes over for a while.
class Skipped {
 public:
  Skipped(const PrefixIndex& index, i32 owner, Transaction& tx) : index_(index), owner_(owner), tx_(tx) {}
  bool full() const { return items_.size() >= kMost; }
  void add(Item x) {
    items_.push_back(x);
    tx_.push({OpKind::aside, owner_, x.node, x.window});
  }
  // Comes last. Where the transaction fails before, that takes them back.
  void unskip() {
    for (auto x = items_.rbegin(); x != items_.rend(); ++x) {
      if (index_.is_skipped(*x)) tx_.push({OpKind::back, owner_, x->node, x->window});
    }
    items_.clear();
  }

 private:
  static constexpr std::size_t kMost = 1024;  // so that a call stays short
  const PrefixIndex& index_;
  const i32 owner_;
  Transaction& tx_;
  std::vector<Item> items_;
};

}  // namespace kvmem
