#include "allocator/records.h"

#include <algorithm>
#include <string>

namespace kvmem {

i64 SequenceRecords::open(Transaction& tx) {
  const i64 handle = sequences_.next_handle();
  tx.push({OpKind::open, 0, handle});
  return handle;
}

void SequenceRecords::close(i64 index, Transaction& tx) {
  table_.close(index, tx);
  for (i64 g = 1; g < groups_.count(); ++g) {
    set_front(index, g, 0, tx);
    set_committed(index, g, 0, tx);
    set_tokens(index, g, 0, tx);
  }
  set_front(index, 0, 0, tx);
  // One record instead of three: its numbers are the lengths of group 0.
  tx.push({OpKind::close, 0, sequences_.handle_of(index), sequences_.tokens(index, 0), sequences_.committed(index, 0)});
}

void SequenceRecords::set_tokens(i64 index, i64 g, i64 tokens, Transaction& tx) {
  const i64 old = sequences_.tokens(index, g);
  if (old != tokens) tx.push({OpKind::length, static_cast<i32>(g), sequences_.handle_of(index), tokens, old});
}

void SequenceRecords::set_committed(i64 index, i64 g, i64 tokens, Transaction& tx) {
  const i64 old = sequences_.committed(index, g);
  if (old != tokens) tx.push({OpKind::commit, static_cast<i32>(g), sequences_.handle_of(index), tokens, old});
}

void SequenceRecords::set_front(i64 index, i64 g, i64 token, Transaction& tx) {
  const i64 old = sequences_.front(index, g);
  if (old != token) tx.push({OpKind::front, static_cast<i32>(g), sequences_.handle_of(index), token, old});
}

void SequenceRecords::commit_moving(const StepPlan& plan, Transaction& tx) {
  for (i64 i : plan.moving) commit_one(plan.indices[i], plan.commits[i], plan.group, tx);
}

void SequenceRecords::commit_one(i64 index, i64 count, i64 group, Transaction& tx) {
  for (i64 g = groups_.begin(group); g < groups_.end(group); ++g) {
    if (!groups_.grows(g, group) || count == 0) continue;
    const i64 done = sequences_.committed(index, g) + count;
    const i64 old = sequences_.front(index, g), first = planner_.front_after(index, g, done);
    set_committed(index, g, done, tx);
    if (first != old) table_.advance_front(index, g, old, first, tx);
    set_front(index, g, first, tx);
  }
}

void SequenceRecords::note_committed(const StepPlan& plan) {
  const i64* const indices = plan.indices.data();
  const i32* const counts = plan.commits;
  for (i64 g = groups_.begin(plan.group); g < groups_.end(plan.group); ++g) {
    if (!groups_.grows(g, plan.group)) continue;
    Sequences::Lengths* const lengths = sequences_.lengths(g, 0);
    i64 i = 0;
    const auto add_until = [&](i64 end) {
      for (const i64 step = groups_.count(); i < end; ++i) lengths[indices[i] * step].committed += counts[i];
    };
    for (i64 moved : plan.moving) add_until(moved), ++i;  // these have it already
    add_until(plan.n);
  }
}

void SequenceRecords::apply(const Op& op, bool undo) {
  switch (op.kind) {
    case OpKind::length:
      return set_value(op, &Sequences::Lengths::tokens);
    case OpKind::commit:
      return set_value(op, &Sequences::Lengths::committed);
    case OpKind::front:
      set_value(op, &Sequences::Lengths::front);
      return table_.on_front(sequences_.index(op.a), op.at, op.c, op.b, undo);
    case OpKind::open:
      sequences_.on_open(op.a, undo);
      if (op.b != 0) set_main(op.a, op.b, op.c);
      return;
    default:  // close
      if (op.b != 0) set_main(op.a, 0, 0);
      return sequences_.on_close(op.a, undo);
  }
}

void SequenceRecords::set_main(i64 handle, i64 tokens, i64 committed) {
  Sequences::Lengths& lengths = *sequences_.lengths(0, sequences_.index(handle));
  lengths.tokens = tokens, lengths.committed = committed;
}

void SequenceRecords::set_value(const Op& op, i64 Sequences::Lengths::* which) {
  groups_.check(op.at);
  i64& value = sequences_.lengths(op.at, sequences_.index(op.a))->*which;
  if (value != op.c || op.b < 0 || op.b > groups_[op.at].max_tokens) refuse_value(op, value);
  value = op.b;
}

void SequenceRecords::refuse_value(const Op& op, i64 value) {
  throw SpecError("sequence handle " + std::to_string(op.a) + ": a length of " + std::to_string(value) +
                  " cannot go from " + std::to_string(op.c) + " to " + std::to_string(op.b));
}

void AddedLengths::add(i64 sign) {
  const i64* const indices = plan_.indices.data();
  const i32* const counts = plan_.more;
  const i64 n = plan_.n, group = plan_.group, step = groups_.count();
  for (i64 g = groups_.begin(group); g < groups_.end(group); ++g) {
    if (!groups_.grows(g, group)) continue;
    Sequences::Lengths* const lengths = sequences_.lengths(g, 0);
    for (i64 i = 0; i < n; ++i) lengths[indices[i] * step].tokens += sign * counts[i];
  }
}

// As a transaction would have it, of the lengths to be added: all of them, or none.
void AddedLengths::log() {
  std::vector<Op>& log = pool_.log;
  const std::size_t most = log.size() + static_cast<std::size_t>(plan_.n * groups_.count());
  if (log.capacity() < most) log.reserve(std::max(most, 2 * log.capacity()));
  for (i64 g = groups_.begin(plan_.group); g < groups_.end(plan_.group); ++g) {
    for (i64 i = 0; i < plan_.n; ++i) {
      if (!groups_.grows(g, plan_.group) || plan_.more[i] == 0) continue;
      const i64 tokens = sequences_.tokens(plan_.indices[i], g);
      log.push_back({OpKind::length, static_cast<i32>(g), plan_.handles[i], tokens + plan_.more[i], tokens});
    }
  }
}

void AddedLengths::take_back() {
  add(-1);
  std::vector<Op>& log = pool_.log;
  log.erase(log.begin() + static_cast<std::ptrdiff_t>(logged_), log.begin() + static_cast<std::ptrdiff_t>(noted_));
}

}  // namespace kvmem
