// Following another allocator's ops: what a list may do.
//
// A list is believed as far as it explains itself; what it says of memory has to agree with what it says of tables.
// True lists keep the rules below whatever the other allocator does, and whatever it has cached that nobody here knows
// of. Whoever breaks one is refused, and nothing has changed:
//
//   1. Every id, slot, byte, row, block, group and handle exists, in an arena of this allocator. Pages are below the
//      number that the pool has ever been allowed.
//   2. A write (zero, copy) goes to memory that nobody has: a page that the list has mapped from the free ones; a block
//      that no table shows, or that the list has put into one table since; a row of no sequence, or bound by the list.
//      What is zeroed may also lie behind the length of the one sequence that has it, the least it has had in the list.
//      What the list has copied somewhere is not written again while somebody has it.
//   3. Tokens that are live before the list and after it hold the same bytes after it as before, wherever they have
//      moved: ByteLedger follows the copies. The one exception is a whole block that becomes committed and is replaced
//      by one with equal tokens: one that was committed whole at the same place, and has not been written since.
//   4. After the list every live sequence that it names, or whose row or blocks it touches, has the memory that its
//      lengths speak of, and nobody is about to grow in memory that another one reads.
//
// It cannot be known whether a list lacks a zero, whether a length or a commit says the number that the leader meant,
// and whether memory that no live sequence has holds what a sequence to come is told it does.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "base/ops.h"
#include "table/byte_ledger.h"
#include "table/sequences.h"

namespace kvmem {

// What the records so far have done to lengths.
class FollowedLengths {
 public:
  struct Range {
    i64 first, end;
  };

  explicit FollowedLengths(const Sequences& sequences) : sequences_(sequences) {}

  // A record that has been applied.
  void note(const Op& op) {
    if (op.kind == OpKind::open) opened_.insert(op.a);
    if (op.kind != OpKind::length && op.kind != OpKind::front) return;
    const bool is_new = opened(op.a);
    const i64 index = sequences_.index(op.a),
              tokens = op.kind == OpKind::length ? op.c : sequences_.tokens(index, op.at);
    const i64 front = op.kind == OpKind::front ? op.c : sequences_.front(index, op.at);
    Seen& seen = seen_.try_emplace({op.a, op.at}, Seen{is_new ? 0 : tokens, front, 0, tokens}).first->second;
    if (op.kind == OpKind::front) {
      seen.front = std::max(seen.front, op.b);
    } else {
      seen.tokens = std::min(seen.tokens, op.b);
      if (is_new && op.c == 0) seen.began = seen.least = op.b;
      seen.least = std::min(seen.least, op.b);
    }
  }

  bool opened(i64 handle) const { return opened_.count(handle) > 0; }

  // How many tokens a sequence that the list has opened began with.
  i64 began(i64 handle, i64 group) const {
    const auto seen = seen_.find({handle, group});
    return seen == seen_.end() ? 0 : seen->second.began;
  }

  // The fewest tokens that a live sequence has had, counting one that the list has opened from when it got its first.
  i64 least(i64 handle, i64 group) const {
    const auto seen = seen_.find({handle, group});
    return seen == seen_.end() ? sequences_.tokens(sequences_.index(handle), group) : seen->second.least;
  }

  // The tokens of a live sequence that were live before the list, and all the time since.
  Range unchanged(i64 handle, i64 group) const {
    const i64 index = sequences_.index(handle);
    Range range{sequences_.front(index, group), sequences_.tokens(index, group)};
    if (opened(handle)) return {0, 0};
    if (const auto seen = seen_.find({handle, group}); seen != seen_.end()) {
      range = {std::max(range.first, seen->second.front), std::min(range.end, seen->second.tokens)};
    }
    return range;
  }

  // kept() of a handle that may have been closed.
  Range unchanged_if_live(i64 handle, i64 group) const {
    const i64 place = sequences_.place_of(handle);
    return sequences_.live(place) && sequences_.handle_of(place) == handle ? unchanged(handle, group) : Range{0, 0};
  }

 private:
  struct Seen {
    i64 tokens, front, began;  // the fewest there were, the highest, and what the first record said
    i64 least;                 // the fewest that there were since it began
  };
  const Sequences& sequences_;
  std::set<i64> opened_;
  std::map<std::pair<i64, i64>, Seen> seen_;  // by handle and group
};

// The rules that differ by backend; paged_follow.cpp and virtual_follow.cpp.
class FollowRules {
 public:
  FollowRules(const FollowedLengths& lengths, i64 page_bytes) : lengths_(lengths), page_bytes_(page_bytes) {}
  virtual ~FollowRules() = default;

  // A record that has just been applied. Throws SpecError.
  void after(const Op& op) {
    switch (op.kind) {
      case OpKind::map:
        return mapped(op);
      case OpKind::unmap:
        return unmapped(op);
      case OpKind::zero:
        return zeroed(op);
      case OpKind::copy:
        return copied(op);
      case OpKind::destroy:
        return ledger_.erase(op.a * page_bytes_, op.b * page_bytes_);
      default:
        return told(op);
    }
  }
  // All of them have. Throws SpecError.
  virtual void finish() = 0;
  // The transaction is done.
  virtual void commit() {}

 protected:
  virtual void mapped(const Op& op) = 0;
  virtual void unmapped(const Op& op) = 0;
  virtual void zeroed(const Op& op) = 0;
  virtual void copied(const Op& op) = 0;
  virtual void told(const Op& op) = 0;  // of the tables, and of what needs no rule

  [[noreturn]] static void refuse(const std::string& why) {
    throw SpecError("the ops do not follow from here: " + why);
  }
  i64 page_bytes() const { return page_bytes_; }

  const FollowedLengths& lengths_;
  ByteLedger ledger_;

 private:
  const i64 page_bytes_;
};

}  // namespace kvmem
