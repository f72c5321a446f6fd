// Follows another allocator's decisions: applies a list of its ops, or refuses it. table/follow.h says what a list may
// do.
//
// State: whether the latest sequence came by apply(). Invariant: after a list every live sequence that it names has the
// memory that its lengths speak of. An error leaves all as it was. REQUIRES the pool's lock, and an index that knows
// nothing.
#pragma once

#include <vector>

#include "allocator/groups.h"
#include "memory/transaction.h"
#include "table/follow.h"
#include "table/page_table.h"
#include "table/sequences.h"

namespace kvmem {

class Follower {
 public:
  Follower(const Groups& groups, PagePool& pool, Sequences& sequences, const PrefixIndex& index, PageTable& table,
           TableState& tables)
      : groups_(groups), pool_(pool), sequences_(sequences), index_(index), table_(table), tables_(tables) {}

  // SpecError when the list does not follow from here. Cost: linear in the list.
  void apply(const std::vector<Op>& ops);
  // The latest sequence came by apply(), so another allocator decides about memory.
  bool follows() const { return followed_to_ == sequences_.opened(); }

 private:
  // Tokens [from, end) that a followed sequence has got, and which of the pages or blocks there others read.
  struct Grown {
    i64 handle, group, from, end;
    std::vector<i64> shared;
  };
  void follow(const std::vector<Op>& ops, FollowedLengths& lengths, FollowRules& rules, Transaction& tx);
  void follow_one(const Op& op, std::vector<Grown>* grown, Transaction& tx);
  std::vector<Op> spelt_out(const Op& op) const;
  void check_run(const Op& op) const;
  void check_record(const Op& op) const;
  void look_at_tails(i64 g);
  bool note_mapped(const Op& op);
  void check_grown(const Grown& grown) const;
  void check_empty(i64 index) const;
  void check_lengths(i64 index) const;
  [[noreturn]] void refuse(i64 handle) const;

  const Groups& groups_;
  PagePool& pool_;
  Sequences& sequences_;
  const PrefixIndex& index_;
  PageTable& table_;
  TableState& tables_;
  i64 followed_to_ = -1;  // sequences_.opened() after the latest apply()
};

}  // namespace kvmem
