#include "allocator/growth.h"

#include <algorithm>
#include <new>
#include <string>

namespace kvmem {

// ---- records -------------------------------------------------------------------------------------

i64 SequenceRecords::open(Transaction& tx) {
  const i64 handle = sequences_.next_handle();
  tx.push({OpKind::open, 0, handle});
  KVMEM_ASSERT(sequences_.is_live(handle), "the sequence is open");
  return handle;
}

void SequenceRecords::close(i64 index, Transaction& tx) {
  KVMEM_ASSERT(sequences_.live(index), "the sequence is live");
  table_.close(index, tx);
  for (i64 g = 1; g < groups_.count(); ++g) {
    set_front(index, g, 0, tx);
    set_committed(index, g, 0, tx);
    set_tokens(index, g, 0, tx);
  }
  set_front(index, 0, 0, tx);
  // The record carries the lengths of group 0, which saves two records.
  tx.push({OpKind::close, 0, sequences_.handle_of(index), sequences_.tokens(index, 0), sequences_.committed(index, 0)});
}

void SequenceRecords::set_tokens(i64 index, i64 g, i64 tokens, Transaction& tx) {
  const i64 old = sequences_.tokens(index, g);
  KVMEM_ASSERT(0 <= tokens && tokens <= groups_[g].max_tokens, "the sequence can be so long");
  if (old != tokens) tx.push({OpKind::length, static_cast<i32>(g), sequences_.handle_of(index), tokens, old});
}

void SequenceRecords::set_committed(i64 index, i64 g, i64 tokens, Transaction& tx) {
  const i64 old = sequences_.committed(index, g);
  KVMEM_ASSERT(0 <= tokens && tokens <= sequences_.tokens(index, g), "only tokens with room are committed");
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
    KVMEM_ASSERT(old <= first && first <= done, "a window only moves forward, over committed tokens");
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
    for (i64 moved : plan.moving) add_until(moved), ++i;  // commit_moving() has committed this one
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
  KVMEM_ASSERT(0 <= committed && committed <= tokens, "only tokens with room are committed");
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

// ---- added lengths -------------------------------------------------------------------------------

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

// Appends the records of the lengths to be added to the pool's log: all of them, or none.
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

void AddedLengths::undo() {
  KVMEM_ASSERT(logged_ <= added_ || added_ == 0, "the log only grows");
  add(-1);
  std::vector<Op>& log = pool_.log;
  log.erase(log.begin() + static_cast<std::ptrdiff_t>(logged_), log.begin() + static_cast<std::ptrdiff_t>(added_));
}

// ---- room for tokens -----------------------------------------------------------------------------

template <class Grow>
void SequenceGrowth::with_or_without_cache(Transaction& tx, const Grow& grow) {
  const Transaction::Point before = tx.here();
  try {
    return grow();
  } catch (const OutOfMemory&) {
    if (!table_.eviction_scatters()) throw;
  }
  tx.roll_back_to(before);
  table_.evict_all(tx);
  grow();
}

void SequenceGrowth::grow_needy(const StepPlan& plan, std::size_t* done, Transaction& tx) {
  with_or_without_cache(tx, [&] {
    *done = 0;
    grow_in_order(plan, done, tx);
  });
}

void SequenceGrowth::grow_in_order(const StepPlan& plan, std::size_t* done, Transaction& tx) {
  if (groups_.is_simple()) {
    for (; *done < plan.needy.size(); ++*done) {
      const i64 i = plan.needy[*done], index = plan.indices[i], tokens = sequences_.tokens(index, 0);
      table_.grow(index, 0, tokens - plan.more[i], tokens, tx);
    }
    return;
  }
  for (; *done < plan.needy.size(); ++*done) {
    const i64 i = plan.needy[*done];
    grow_one(plan.indices[i], plan.more[i], plan.group, tx);
  }
}

void SequenceGrowth::grow_one(i64 index, i64 count, i64 group, Transaction& tx) {
  KVMEM_ASSERT(count >= 0, "a sequence grows by a number of tokens");
  for (i64 g = groups_.begin(group); g < groups_.end(group); ++g) {
    if (groups_.grows(g, group)) {
      const i64 tokens = sequences_.tokens(index, g);
      table_.grow(index, g, tokens - count, tokens, tx);
      if (planner_.lacks_null_block(g, tokens)) table_.back_reserved(g, tx);
    } else if (groups_[g].growth == Growth::fixed && sequences_.tokens(index, g) == 0) {
      records_.set_tokens(index, g, 1, tx);
      table_.grow(index, g, 0, 1, tx);
      records_.set_committed(index, g, 1, tx);  // after grow(), which may zero the row it binds
    }
  }
}

void SequenceGrowth::grow_to(i64 index, i64 tokens, i64 held, Transaction& tx) {
  for (i64 g = 0; g < groups_.count(); ++g) {
    if (groups_.grows(g, -1)) records_.set_tokens(index, g, tokens, tx);
  }
  KVMEM_ASSERT(0 <= held && held <= tokens, "a sequence grows by a number of tokens");
  with_or_without_cache(tx, [&] { grow_one(index, tokens - held, -1, tx); });
}

void SequenceGrowth::explain(const StepPlan& plan, std::size_t done, const OutOfMemory& why) const {
  if (plan.needy.empty()) throw why;
  const i64 i = plan.needy[std::min(done, plan.needy.size() - 1)], index = plan.indices[i];
  const i64 g = groups_.one(plan.group), have = sequences_.tokens(index, g);
  const i64 fits = table_.tokens_that_fit(index, g, pool_.available_pages(table_));
  throw OutOfMemory("asked to extend sequence handle " + std::to_string(sequences_.handle_of(index)) + " from " +
                    std::to_string(have) + " by " + std::to_string(plan.more[i]) + " tokens: " + why.what() +
                    "; alone it could grow by about " + std::to_string(std::max(i64{0}, fits - have)) +
                    ". Free or preempt a sequence, or raise the memory with set_memory()");
}

void SequenceGrowth::start_ahead(const i64* indices, i64 n, i64 group) {
  if (pool_.space() && !pool_.mapper().start()) return;
  try {
    decide_ahead(indices, n, group);
  } catch (const OutOfMemory&) {
  } catch (const std::bad_alloc&) {
  }  // in both cases the next steps map what they need
}

void SequenceGrowth::decide_ahead(const i64* indices, i64 n, i64 group) {
  std::vector<i64> touched;
  touched.reserve(n);
  Transaction tx(pool_, tables_);
  for (i64 i = 0; i < n; ++i) {
    if (decide_one(indices[i], group, tx)) touched.push_back(indices[i]);
  }
  if (touched.empty()) return;
  tx.expect_deferred();
  i64 job = 0;
  if (pool_.space()) job = pool_.mapper().post(pool_.shared_space(), tx.ops());
  tx.commit_deferred();
  for (i64 index : touched) {
    if (job != 0) table_.set_pending(index, job);
  }
}

bool SequenceGrowth::decide_one(i64 index, i64 group, Transaction& tx) {
  bool any = false;
  for (i64 g = groups_.begin(group); g < groups_.end(group); ++g) {
    if (groups_[g].growth != Growth::token || !groups_.grows(g, group)) continue;
    const i64 have = sequences_.tokens(index, g);
    const i64 want = std::min(have + groups_.geometry().map_ahead_tokens, groups_[g].max_tokens);
    any = (!table_.has_room(index, g, want) && table_.map_ahead(index, g, have, tx)) || any;
  }
  return any;
}

}  // namespace kvmem
