// Steps: what a scheduler and a model runner call for every token. As long as all sequences have room, a step changes
// lengths only; it allocates nothing and calls no driver.

#include <algorithm>

#include "allocator/update.h"

namespace kvmem {

void Allocator::step(const i32* handles, const i32* counts, i64 n, const i32* ids, i64 num_ids, i64 rows,
                     GroupBuffers* groups, i64 num_groups, TableChanges* changes) {
  update([&] {
    const BatchGroups batch{groups, num_groups};
    rows = std::max(rows, n);
    planner_.extend(handles, counts, n, -1, &plan_);
    planner_.commit_due(ids, num_ids, &plan_);
    filler_.check_step(plan_, rows, batch);
    execute(rows > n && filler_.lacks_padding(batch) ? batch : BatchGroups{}, changes);
    filler_.write(plan_, nullptr, rows, batch, this->changes());
  });
}

void Allocator::step(i32 handle, i64 count, const i32* ids, i64 num_ids, TableChanges* changes) {
  const bool done = try_fast_path(handle, [&](i64 index, i64 due) {
    if ((ids && num_ids != due) || !has_room(index, count, changes) || !commit_in_block(index, due, ids)) return false;
    sequences_.tokens(index, 0) += count;
    return true;
  });
  if (done) return;
  const i32 more = to_int32(count, "count");
  update([&] {
    planner_.extend(&handle, &more, 1, -1, &plan_);
    planner_.commit_due(ids, num_ids, &plan_);
    execute({}, changes);
  });
}

void Allocator::extend(const i32* handles, const i32* counts, i64 n, i64 group, TableChanges* changes) {
  update([&] {
    groups_.check_own_count(group, "extend");
    planner_.extend(handles, counts, n, group, &plan_);
    execute({}, changes);
  });
}

void Allocator::extend(i32 handle, i64 count, i64 group, TableChanges* changes) {
  const auto grow = [&](i64 index, i64) {
    if (!has_room(index, count, changes)) return false;
    sequences_.tokens(index, 0) += count;
    return true;
  };
  if (group < 0 && try_fast_path(handle, grow)) return;
  const i32 more = to_int32(count, "count");
  extend(&handle, &more, 1, group, changes);
}

void Allocator::commit(const i32* handles, const i32* counts, i64 n, i64 group, const i32* ids, TableChanges* changes) {
  update([&] {
    planner_.commit(handles, counts, n, group, ids, &plan_);
    execute({}, changes);
  });
}

void Allocator::commit(i32 handle, i64 count, i64 group, const i32* ids, TableChanges* changes) {
  const auto advance = [&](i64 index, i64 due) {
    return count >= 0 && count <= due && commit_in_block(index, count, ids);
  };
  if (group < 0 && try_fast_path(handle, advance)) return;
  const i32 known = to_int32(count, "count");
  commit(&handle, &known, 1, group, ids, changes);
}

// Carries out plan_: grows, publishes, commits and, at the end, maps ahead. `padded`: the groups of a batch that lack
// the null and padding block.
void Allocator::execute(const BatchGroups& padded, TableChanges* changes) {
  if (!prefix_.on || plan_.group >= 0) plan_.ids = nullptr;
  if (changes) table_diff_.note_before(plan_, changes);
  const bool publishes = plan_.commits && contents_.completes_any(plan_);
  if (plan_.more || publishes || padded.count > 0 || !plan_.moving.empty()) execute_changes(padded, publishes);
  if (plan_.commits) {
    records_.note_committed(plan_);
    contents_.note_published(plan_);
  }
  if (plan_.more) growth_.map_ahead(plan_.indices.data(), plan_.n, plan_.group);
  if (changes) table_diff_.write_changes(plan_, changes);
}

// The part of a plan that can fail: one transaction that grows first and moves windows afterwards. Lengths are added
// before it, because the page table reads them when it looks for pages to reclaim.
void Allocator::execute_changes(const BatchGroups& padded, bool publishes) {
  const bool makes_room = !plan_.needy.empty() || padded.count > 0;
  std::size_t done = 0;
  try {
    AddedLengths lengths(groups_, *pool_, sequences_, plan_);
    if (makes_room || publishes || !plan_.moving.empty()) {
      if (makes_room) pool_->settle();
      Transaction tx(*pool_, *this);
      if (padded.count > 0) filler_.back_padding(padded, follower_.follows(), tx);
      growth_.grow_needy(plan_, &done, tx);
      if (publishes) contents_.publish(plan_, tx);
      if (!plan_.moving.empty()) records_.commit_moving(plan_, tx);
      tx.commit();
    }
    lengths.commit();
  } catch (const OutOfMemory& e) {
    growth_.explain(plan_, done, e);
  }
}

void Allocator::fill(const i32* handles, i64 n, const i32* new_tokens, i64 rows, GroupBuffers* groups, i64 num_groups) {
  const PoolLock lock = lock_to_fill();
  const BatchGroups batch{groups, num_groups};
  rows = std::max(rows, n);
  planner_.find(handles, n, &plan_);
  filler_.check_rows(rows, batch);
  if (rows > n && filler_.lacks_padding(batch)) {
    filler_.check_fill(plan_, new_tokens, rows, batch);
    pool_->settle();
    Transaction tx(*pool_, *this);
    filler_.back_padding(batch, follower_.follows(), tx);
    tx.commit();
  }
  for (const GroupBuffers& group : batch) {
    if (!filler_.has_cuts(plan_, group.group)) continue;
    pool_->settle();
    filler_.zero_cuts(plan_, group.group);
  }
  filler_.write(plan_, new_tokens, rows, batch, changes());
}

i64 Allocator::find_stale(i64 group, const BatchBuffers& filled, const BatchMarks& marks, BatchSizes* sizes) {
  const PoolLock lock = lock_to_fill();
  const i64 stale = filler_.find_stale(group, filled, marks);
  if (stale == -1) sizes->changes = changes();
  return stale;
}

// ---- the fast path: one sequence, nothing to decide ------------------------------------------------

// Returns run(index, due), where `due` is the number of tokens that are reserved and not committed. Returns false, and
// has changed nothing, if the lock is taken, if several groups or a window take part, and if the call has to be checked
// (debug) or recorded.
template <class FastPath>
bool Allocator::try_fast_path(i32 handle, const FastPath& run) {
  fork_guard_.check("the allocator");
  const PoolLock lock = pool_->try_lock();
  if (!lock || !groups_.only_grows() || groups_.geometry().debug || pool_->recording) return false;
  const i64 index = sequences_.index(handle);
  return run(index, sequences_.tokens(index, 0) - sequences_.committed(index, 0));
}

// Returns whether the sequence can grow by `count` tokens with nothing to decide, zero or map ahead. `in_last_block`:
// the tokens must fit into the last block, so that no table entry is written. REQUIRES: there is one group, which only
// grows.
bool Allocator::has_room(i64 index, i64 count, bool in_last_block) {
  const i64 have = sequences_.tokens(index, 0), after = have + count;
  if (in_last_block && after > round_up(have, groups_[0].block_tokens)) return false;
  return count >= 0 && groups_.geometry().map_ahead_tokens == 0 && groups_.is_simple() &&
         after <= groups_[0].max_tokens && table_->has_room(index, 0, after);
}

// Commits `count` tokens. Returns false, and has changed nothing, if known tokens complete a block.
bool Allocator::commit_in_block(i64 index, i64 count, const i32* ids) {
  const bool known = prefix_.on && ids != nullptr;
  if (known && contents_.completes(index, count)) return false;
  sequences_.committed(index, 0) += count;
  KVMEM_ASSERT(sequences_.committed(index, 0) <= sequences_.tokens(index, 0), "only tokens with room are committed");
  if (known) contents_.note_tail(index, ids, count);
  return true;
}

// ---- truncate() and can_fit() ------------------------------------------------------------------------

void Allocator::truncate(i64 handle, i64 tokens) {
  update([&] {
    const i64 index = sequences_.index(handle), have = sequences_.tokens(index, groups_.token_group());
    check_cut(handle, index, tokens);
    contents_.prepare_cut(handle, index, tokens);
    if (table_->pending(index) != 0) pool_->settle();  // shrink() may unmap pages that the mapper thread still maps
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
  const i64 block = matcher_.block_tokens(), end = round_up(tokens, block);
  if (prefix_.append_only && end != tokens && end <= sequences_.committed(index, groups_.token_group())) {
    refuse(", within a block of " + std::to_string(block) +
           " committed ones, which would have to be copied to another; " + "with append_only=True cut at " +
           std::to_string(end - block) + " or at " + std::to_string(end));
  }
  for (i64 g = 0; g < groups_.count(); ++g) {
    const i64 window = groups_[g].window_tokens, first = sequences_.front(index, g);
    if (first == 0 || tokens - window + 1 >= first) continue;
    refuse(", but its sliding window of " + std::to_string(window) + " has dropped tokens before " +
           std::to_string(first) + "; the least that would do is " + std::to_string(first + window - 1));
  }
}

// Decides what such a sequence takes, and undoes it before the driver is called.
bool Allocator::can_fit(i64 tokens) {
  return update([&] {
    if (sequences_.count() == sequences_.capacity()) return false;
    for (const GroupGeometry& group : groups_.geometry().groups) {
      if (group.growth == Growth::token && tokens > group.max_tokens) return false;
    }
    pool_->settle();
    Transaction tx(*pool_, *this);
    try {
      const i64 index = sequences_.index(records_.open(tx));
      if (tokens > 0 || groups_.has_state()) growth_.grow_to(index, tokens, 0, tx);
    } catch (const OutOfMemory&) {
      return false;
    }
    return true;
  });
}

}  // namespace kvmem
