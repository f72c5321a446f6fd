// The step: what a scheduler and a model runner call once for every token. When all of it has room already, only
// lengths grow; nothing is allocated and no driver is called.

#include <algorithm>

#include "allocator/allocator.h"
#include "allocator/mutate.h"

namespace kvmem {

void Allocator::step(const i32* handles, const i32* counts, i64 n, const i32* ids, i64 num_ids, i64 rows,
                     GroupBuffers* groups, i64 num_groups, TableChanges* changes) {
  mutate([&] {
    const BatchGroups batch{groups, num_groups};
    rows = std::max(rows, n);
    planner_.extend(handles, counts, n, -1, &plan_);
    planner_.commit_due(ids, num_ids, &plan_);
    filler_.check_step(plan_, rows, batch);
    carry_out(rows > n && filler_.lacks_padding(batch) ? batch : BatchGroups{}, changes);
    filler_.write(plan_, nullptr, rows, batch, this->changes());
  });
}

void Allocator::step(i32 handle, i64 count, const i32* ids, i64 num_ids, TableChanges* changes) {
  const bool short_enough = try_short(handle, [&](i64 index, i64 due) {
    if ((ids && num_ids != due) || !has_room(index, count, changes) || !commit_in_block(index, due, ids)) return false;
    sequences_.tokens(index, 0) += count;
    return true;
  });
  if (short_enough) return;
  const i32 more = to_int32(count, "count");
  mutate([&] {
    planner_.extend(&handle, &more, 1, -1, &plan_);
    planner_.commit_due(ids, num_ids, &plan_);
    carry_out({}, changes);
  });
}

void Allocator::extend(const i32* handles, const i32* counts, i64 n, i64 group, TableChanges* changes) {
  mutate([&] {
    groups_.check_own_count(group, "extend");
    planner_.extend(handles, counts, n, group, &plan_);
    carry_out({}, changes);
  });
}

void Allocator::extend(i32 handle, i64 count, i64 group, TableChanges* changes) {
  const bool short_enough = group < 0 && try_short(
                                             handle,
                                             [&](i64 index, i64) {
                                               if (!has_room(index, count, changes)) return false;
                                               sequences_.tokens(index, 0) += count;
                                               return true;
                                             });
  if (short_enough) return;
  const i32 more = to_int32(count, "count");
  extend(&handle, &more, 1, group, changes);
}

void Allocator::commit(const i32* handles, const i32* counts, i64 n, i64 group, const i32* ids, TableChanges* changes) {
  mutate([&] {
    planner_.commit(handles, counts, n, group, ids, &plan_);
    carry_out({}, changes);
  });
}

void Allocator::commit(i32 handle, i64 count, i64 group, const i32* ids, TableChanges* changes) {
  const bool short_enough =
      group < 0 &&
      try_short(
          handle, [&](i64 index, i64 due) { return count >= 0 && count <= due && commit_in_block(index, count, ids); });
  if (short_enough) return;
  const i32 known = to_int32(count, "count");
  commit(&handle, &known, 1, group, ids, changes);
}

void Allocator::carry_out(const BatchGroups& padded, TableChanges* changes) {
  if (!prefix_.on || plan_.group >= 0) plan_.ids = nullptr;
  if (changes) table_diff_.see(plan_, changes);
  const bool publishes = plan_.commits && contents_.completes_any(plan_);
  if (plan_.more || publishes || padded.count > 0 || !plan_.moving.empty()) change(padded, publishes);
  if (plan_.commits) {
    records_.note_committed(plan_);
    contents_.note_published(plan_);
  }
  if (plan_.more) room_.map_ahead(plan_.indices.data(), plan_.n, plan_.group);
  if (changes) table_diff_.written(plan_, changes);
}

// Room first, then windows move on: all of it in one transaction, which most steps need none of. The lengths come
// before everything: what looks for pages to reclaim then sees what is needed. `padded`: groups that lack the blocks
// which padding rows read and write.
void Allocator::change(const BatchGroups& padded, bool publishes) {
  const bool makes_room = !plan_.needy.empty() || padded.count > 0;
  std::size_t done = 0;
  try {
    AddedLengths lengths(groups_, *pool_, sequences_, plan_);
    if (makes_room || publishes || !plan_.moving.empty()) {
      if (makes_room) settle();
      Transaction tx(*pool_, *this);
      if (padded.count > 0) filler_.back_padding(padded, follower_.follows(), tx);
      room_.make(plan_, &done, tx);
      if (publishes) contents_.publish(plan_, tx);
      if (!plan_.moving.empty()) records_.commit_moving(plan_, tx);
      tx.commit();
    }
    lengths.done();
  } catch (const OutOfMemory& e) {
    room_.explain(plan_, done, e);
  }
}

void Allocator::fill(const i32* handles, i64 n, const i32* new_tokens, i64 rows, GroupBuffers* groups, i64 num_groups) {
  const PoolLock lock = enter_still();
  const BatchGroups batch{groups, num_groups};
  rows = std::max(rows, n);
  planner_.find(handles, n, &plan_);
  filler_.check_rows(rows, batch);
  if (rows > n && filler_.lacks_padding(batch)) {
    filler_.check_fill(plan_, new_tokens, rows, batch);
    settle();
    Transaction tx(*pool_, *this);
    filler_.back_padding(batch, follower_.follows(), tx);
    tx.commit();
  }
  for (const GroupBuffers& group : batch) {
    if (!filler_.has_cuts(plan_, group.group)) continue;
    settle();
    filler_.zero_cuts(plan_, group.group);
  }
  filler_.write(plan_, new_tokens, rows, batch, changes());
}

i64 Allocator::find_stale(i64 group, const BatchBuffers& filled, const BatchMarks& marks, BatchSizes* sizes) {
  const PoolLock lock = enter_still();
  const i64 stale = filler_.find_stale(group, filled, marks);
  if (stale == -1) sizes->changes = changes();
  return stale;
}

// ---- one sequence, and nothing to decide ---------------------------------------------------------

// run(index, due), `due`: tokens that are reserved and not committed. False, and nothing has changed, where that cannot
// be, where something has to be waited for, and where somebody looks: more than one group, a window, a debug build, a
// record of everything.
template <class Short>
bool Allocator::try_short(i32 handle, const Short& run) {
  fork_guard_.check("the allocator");
  const PoolLock lock = pool_->try_lock();
  if (!lock || !groups_.only_grows() || groups_.geometry().debug || pool_->recording) return false;
  const i64 index = sequences_.index(handle);
  return run(index, sequences_.tokens(index, 0) - sequences_.committed(index, 0));
}

// Of one group that only grows: nothing is to be decided, zeroed or mapped ahead. `in_last_block`: so no table is
// written.
bool Allocator::has_room(i64 index, i64 count, bool in_last_block) {
  const i64 have = sequences_.tokens(index, 0), after = have + count;
  if (in_last_block && after > round_up(have, groups_[0].block_tokens)) return false;
  return count >= 0 && groups_.geometry().map_ahead_tokens == 0 && groups_.is_simple() &&
         after <= groups_[0].max_tokens && table_->has_room(index, 0, after);
}

// False, and nothing has changed, where known tokens complete a block.
bool Allocator::commit_in_block(i64 index, i64 count, const i32* ids) {
  const bool known = prefix_.on && ids != nullptr;
  if (known && contents_.completes(index, count)) return false;
  sequences_.committed(index, 0) += count;
  if (known) contents_.note_tail(index, ids, count);
  return true;
}

// ---- shorter, and what would fit -----------------------------------------------------------------

void Allocator::truncate(i64 handle, i64 tokens) {
  mutate([&] {
    const i64 index = sequences_.index(handle), have = sequences_.tokens(index, groups_.token_group());
    check_cut(handle, index, tokens);
    contents_.prepare_cut(handle, index, tokens);
    if (table_->pending(index) != 0) settle();  // shared pages behind the length may be unmapped
    Transaction tx(*pool_, *this);
    for (i64 g = 0; g < groups_.count(); ++g) {
      if (groups_[g].growth != Growth::token) continue;
      table_->shrink(index, g, have, tokens, tx);
      records_.set_committed(index, g, std::min(tokens, sequences_.committed(index, g)), tx);
      records_.set_tokens(index, g, tokens, tx);
    }
    contents_.unpublish(index, tx);
    tx.commit();
    contents_.note_cut(index, have, tokens);
  });
}

void Allocator::check_cut(i64 handle, i64 index, i64 tokens) const {
  const i64 have = sequences_.tokens(index, groups_.token_group());
  const auto refuse = [&](const std::string& why) {
    throw SpecError("asked to truncate sequence handle " + std::to_string(handle) + " to " + std::to_string(tokens) +
                    " tokens" + why);
  };
  if (tokens < 0 || tokens > have) refuse("; it has " + std::to_string(have));
  for (i64 g = 0; g < groups_.count(); ++g) {
    const i64 window = groups_[g].window_tokens, first = sequences_.front(index, g);
    if (first == 0 || tokens - window + 1 >= first) continue;
    refuse(", but its sliding window of " + std::to_string(window) + " has dropped tokens before " +
           std::to_string(first) + "; the least that would do is " + std::to_string(first + window - 1));
  }
}

// What such a sequence would take is decided, and taken back before a driver hears of it.
bool Allocator::can_fit(i64 tokens) {
  return mutate([&] {
    if (sequences_.count() == sequences_.capacity()) return false;
    for (const GroupGeometry& group : groups_.geometry().groups) {
      if (group.growth == Growth::token && tokens > group.max_tokens) return false;
    }
    settle();
    Transaction tx(*pool_, *this);
    try {
      const i64 index = sequences_.index(records_.open(tx));
      if (tokens > 0 || groups_.has_state()) room_.grow_to(index, tokens, 0, tx);  // a state needs room before them
    } catch (const OutOfMemory&) {
      return false;
    }
    return true;
  });
}

}  // namespace kvmem
