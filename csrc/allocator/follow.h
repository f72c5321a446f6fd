// Following another allocator: applies a list of its ops, or refuses it. table/follow.h lists the rules for a list.
//
// State: whether the latest sequence was opened by apply(). Invariant: after a list every live sequence that it names
// has the memory that its lengths claim. Thread safety: every function REQUIRES the pool's lock.
#pragma once

#include <vector>

#include "base/groups.h"
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

  // Executes the list. Throws SpecError, and has changed nothing, if the list does not follow from the present state or
  // if the content index is not empty. Cost: linear in the list.
  void apply(const std::vector<Op>& ops);
  // Returns whether the latest sequence was opened by apply(), so that another allocator decides about memory.
  bool follows() const { return followed_to_ == sequences_.opened(); }

 private:
  // Tokens [from, end) that the list added to a sequence, and the pages or blocks there that other sequences shared
  // before (PageTable::shared_pieces).
  struct Grown {
    i64 handle, group, from, end;
    std::vector<i64> shared;
  };
  void follow(const std::vector<Op>& ops, FollowedLengths& lengths, FollowRules& rules, Transaction& tx);
  void apply_one(const Op& op, std::vector<Grown>* grown, Transaction& tx);
  std::vector<Op> expand(const Op& op) const;
  void check_run(const Op& op) const;
  void check_record(const Op& op) const;
  void check_tails_again(i64 g);
  bool note_effects(const Op& op);
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
