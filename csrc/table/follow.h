// The rules for applying another allocator's ops (a list that take_ops() returned there).
//
// A list is trusted as far as it explains itself: what it says about memory must agree with what it says about tables.
// Every list that an allocator produces obeys the rules below, whatever that allocator has cached. A list that breaks
// one is refused, and nothing has changed.
//
//   1. Every id, slot, byte, row, block, group and handle exists, in an arena of this allocator. Pages are below the
//      largest number that the pool was ever allowed.
//   2. A write (zero, copy, load) goes to memory that nothing uses: a page that the list has mapped from the free
//      ones; a block that no table contains, or that the list has since put into one table; a row that is parked, or
//      bound by the list. A zero may also go behind the length of the one sequence that has the memory, the least
//      length that it has had in the list. What the list has copied is not overwritten while anything uses it.
//   3. Tokens that are live before and after the list have the same bytes before and after, wherever they have moved:
//      ByteLedger follows the copies. The one exception is a whole block that becomes committed and is replaced by a
//      block with equal tokens: one that was committed whole at the same index and has not been written since, but for
//      a store and a load.
//   4. After the list, every live sequence that it names, or whose row or blocks it touches, has the memory that its
//      lengths require, and none is about to grow in memory that another one reads.
//
// Not detectable: that a list lacks a zero; that a length or a commit has another number than the leader meant; that
// memory which no live sequence has does not hold what a later sequence should find there.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "base/ops.h"
#include "table/arenas.h"
#include "table/byte_ledger.h"
#include "table/sequences.h"

namespace kvmem {

// What the ops of a list so far have done to lengths.
class FollowedLengths {
 public:
  struct Range {
    i64 first, end;
  };

  explicit FollowedLengths(const Sequences& sequences) : sequences_(sequences) {}

  // Records an op that has been applied.
  void note(const Op& op) {
    if (op.kind == OpKind::open) opened_.insert(op.a);
    if (op.kind != OpKind::length && op.kind != OpKind::front) return;
    const bool is_new = opened(op.a), is_length = op.kind == OpKind::length;
    const i64 index = sequences_.index(op.a), tokens = is_length ? op.c : sequences_.tokens(index, op.at);
    const i64 front = is_length ? sequences_.front(index, op.at) : op.c;
    const Extremes first{is_new ? 0 : tokens, front, 0, tokens};
    Extremes& x = extremes_.try_emplace({op.a, op.at}, first).first->second;
    if (!is_length) {
      x.front = std::max(x.front, op.b);
      return;
    }
    x.tokens = std::min(x.tokens, op.b);
    if (is_new && op.c == 0) x.began = x.least = op.b;
    x.least = std::min(x.least, op.b);
  }

  bool opened(i64 handle) const { return opened_.count(handle) > 0; }

  // Returns the first length of a sequence that the list opened.
  i64 began(i64 handle, i64 group) const {
    const auto found = extremes_.find({handle, group});
    return found == extremes_.end() ? 0 : found->second.began;
  }

  // Returns the least length of a live sequence in the list; for one that the list opened, since its first length.
  i64 least(i64 handle, i64 group) const {
    const auto found = extremes_.find({handle, group});
    return found == extremes_.end() ? sequences_.tokens(sequences_.index(handle), group) : found->second.least;
  }

  // Returns the tokens of a sequence that were live before the list and ever since; none if it is not live.
  Range unchanged(i64 handle, i64 group) const {
    const i64 index = sequences_.place_of(handle);
    if (!sequences_.live(index) || sequences_.handle_of(index) != handle || opened(handle)) return {0, 0};
    Range range{sequences_.front(index, group), sequences_.tokens(index, group)};
    if (const auto found = extremes_.find({handle, group}); found != extremes_.end()) {
      range = {std::max(range.first, found->second.front), std::min(range.end, found->second.tokens)};
    }
    return range;
  }

 private:
  struct Extremes {
    i64 tokens, front;  // the least length, counting 0 for a new sequence, and the highest front
    i64 began, least;
  };
  const Sequences& sequences_;
  std::set<i64> opened_;
  std::map<std::pair<i64, i64>, Extremes> extremes_;  // by handle and group
};

// The rules of one backend; implemented in paged_follow.cpp and virtual_follow.cpp.
class FollowRules : protected TableContext {
 public:
  FollowRules(const TableContext& context, const FollowedLengths& lengths) : TableContext(context), lengths_(lengths) {}
  virtual ~FollowRules() = default;

  // Checks an op that has just been applied. Throws SpecError.
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
      case OpKind::load:
        return loaded(op);
      case OpKind::store:
        return stored(op);
      case OpKind::destroy:
        return ledger_.erase(op.a * page_bytes(), op.b * page_bytes());
      default:
        return changed(op);
    }
  }
  // Checks the list as a whole, after its last op. Throws SpecError.
  virtual void finish() = 0;
  // The transaction is committed.
  virtual void commit() {}

 protected:
  virtual void mapped(const Op& op) = 0;
  virtual void unmapped(const Op& op) = 0;
  virtual void zeroed(const Op& op) = 0;
  virtual void copied(const Op& op) = 0;
  virtual void loaded(const Op& op) { zeroed({OpKind::zero, op.at, op.a, op.c}); }  // writes what nothing uses
  virtual void stored(const Op&) {}
  virtual void changed(const Op& op) = 0;  // a logical op, or one without a rule

  [[noreturn]] static void refuse(const std::string& why) {
    throw SpecError("the ops do not follow from here: " + why);
  }
  // Calls f(slot, offset in the slot, bytes) for each slot of a range of an arena.
  template <class F>
  void each_slot(i64 offset, i64 bytes, F f) const {
    for (const i64 end = offset + bytes; offset < end;) {
      const i64 within = offset % page_bytes(), n = std::min(end - offset, page_bytes() - within);
      f(offset / page_bytes(), within, n);
      offset += n;
    }
  }

  const FollowedLengths& lengths_;
  ByteLedger ledger_;
};

}  // namespace kvmem
