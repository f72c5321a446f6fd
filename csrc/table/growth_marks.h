// What a page table notes of each sequence in each group between two growths: how many tokens have room, how far tokens
// were written and truncated, and whether the tail may be shared.
#pragma once

#include <algorithm>
#include <vector>

#include "base/check.h"
#include "base/digest.h"
#include "base/journal.h"
#include "base/zero_vector.h"

namespace kvmem {

class GrowthMarks {
 public:
  // `guarded`: whether truncated tokens are tracked. Without a guard no kernel loads them.
  GrowthMarks(i64 sequences, i64 groups, bool guarded, Journal& journal)
      : groups_(groups), journal_(journal), room_tokens_(sequences * groups), copy_tail_(sequences * groups) {
    if (guarded) truncated_to_.assign(static_cast<std::size_t>(sequences * groups), 0);
  }

  // The tokens for which there is known to be room. It may be too low, never too high. Derived.
  i64& room_tokens(i64 index, i64 group) { return room_tokens_[at(index, group)]; }
  // Must be called wherever the room may have become less.
  void reset_room(i64 index, i64 group) { room_tokens_[at(index, group)] = 0; }

  // Whether the page or block of the last token must be copied before the next write, if it turns out to be shared.
  bool copy_tail(i64 index, i64 group) const { return copy_tail_[at(index, group)] != 0; }
  void set_copy_tail(i64 index, i64 group, bool copy) {
    journal_.set(copy_tail_[at(index, group)], static_cast<std::uint8_t>(copy));
  }

  // Tokens before it may have been written and truncated. It may be too high, never too low. REQUIRES: there is a
  // guard.
  i64 truncated_to(i64 index, i64 group) const { return truncated_to_[at(index, group)]; }
  void note_truncated(i64 index, i64 group, i64 old_tokens) {
    if (truncated_to_.empty()) return;
    KVMEM_ASSERT(old_tokens >= 0, "a length");
    i64& to = truncated_to_[at(index, group)];
    to = std::max(to, old_tokens);
    reset_room(index, group);
  }
  // Of a sequence that has no memory yet.
  void reset_truncated(i64 index, i64 group) {
    if (!truncated_to_.empty()) truncated_to_[at(index, group)] = 0;
  }
  // The transaction in progress zeroes all truncated tokens: the mark is reset when it ends, and stays if it is undone.
  void note_zeroed(i64 index, i64 group) { zeroed_.push_back(at(index, group)); }
  void undo_zeroed() { zeroed_.clear(); }
  void finish() {
    for (const i64 at : zeroed_) truncated_to_[at] = 0;
    zeroed_.clear();
  }

  void digest(Hasher& hash) const { hash.add_all(copy_tail_); }

 private:
  i64 at(i64 index, i64 group) const { return index * groups_ + group; }

  const i64 groups_;
  Journal& journal_;
  // [sequence][group]
  ZeroVector<i64> room_tokens_;
  ZeroVector<std::uint8_t> copy_tail_;
  std::vector<i64> truncated_to_;
  std::vector<i64> zeroed_;  // by the transaction in progress
};

}  // namespace kvmem
