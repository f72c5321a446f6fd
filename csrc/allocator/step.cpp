// The step: what a scheduler and a model runner call once for every token. When all of it has room already, extend()
// only adds to lengths; nothing is allocated and no driver is called.

#include <algorithm>
#include <new>

#include "allocator/allocator.h"
#include "allocator/lengths.h"

namespace kvmem {

// Checks every argument; notes the indices, which sequences have no room yet, and what there will be in all.
void Cache::plan_extend(const i32* handles, const i32* counts, i64 n, i64 group) {
  check_group(group);
  ++call_;
  indices_.resize(n);
  due_.resize(n);
  needy_.clear();
  planned_ = Planned();
  if (is_simple_) return plan_simple(handles, counts, n);
  const i64 size = geometry_.groups[token_group_].block_tokens;
  for (i64 i = 0; i < n; ++i) {
    const i64 index = indices_[i] = sequences_.index(handles[i]);
    check_once(index);
    if (counts[i] < 0) refuse_count(handles[i], counts[i]);
    bool room = geometry_.zero != Zero::always;
    for (i64 g = group_begin(group); g < group_end(group); ++g) room = plan_group(index, g, group, counts[i]) && room;
    if (!room) needy_.push_back(i);
    due_[i] = planned_.add(*sequences_.lengths(token_group_, index), counts[i], size);
  }
}

// The same of one group that only grows: every step does this for every sequence, so nothing is looked up twice.
void Cache::plan_simple(const i32* handles, const i32* counts, i64 n) {
  const i64 size = geometry_.groups[0].block_tokens, most = geometry_.groups[0].max_tokens, call = call_;
  const Sequences::Lengths* const lengths = sequences_.lengths(0, 0);
  i64 *const indices = indices_.data(), *const stamps = stamp_.data();
  i32* const due = due_.data();
  Planned planned;
  for (i64 i = 0; i < n; ++i) {
    const i64 index = indices[i] = sequences_.index(handles[i]), after = lengths[index].tokens + counts[i];
    if (stamps[index] == call) refuse_twice(index);
    stamps[index] = call;
    if (counts[i] < 0) refuse_count(handles[i], counts[i]);
    if (after > most) plan_group(index, 0, -1, counts[i]);  // says so
    if (!table_->has_room(index, 0, after)) needy_.push_back(i);
    due[i] = planned.add(lengths[index], counts[i], size);
  }
  planned_ = planned;
}

void Cache::refuse_count(i64 handle, i64 count) const {
  throw SpecError("asked to extend sequence handle " + std::to_string(handle) + " by " + std::to_string(count) +
                  " tokens; use truncate() to shorten it");
}

// True if the group has room for `count` more tokens.
bool Cache::plan_group(i64 index, i64 g, i64 group, i64 count) {
  const GroupGeometry& geometry = geometry_.groups[g];
  const i64 have = sequences_.tokens(index, g), after = have + count;
  if (!grows(g, group)) return geometry.growth != Growth::fixed || have > 0;
  if (after > geometry.max_tokens) {
    throw SpecError("asked to extend sequence handle " + std::to_string(sequences_.handle_of(index)) + " from " +
                    std::to_string(have) + " by " + std::to_string(count) + " tokens; it can hold " +
                    std::to_string(geometry.max_tokens) + " (max_tokens), so at most " +
                    std::to_string(geometry.max_tokens - have) + " more");
  }
  if (geometry.growth != Growth::token && have > 0 && count > 0) {
    throw SpecError("group " + std::to_string(g) + " is fixed after prefill and already holds " + std::to_string(have) +
                    " tokens");
  }
  return table_->has_room(index, g, after) && !lacks_trash(g, after);
}

// Of a plain cache: nothing is to be decided, zeroed or mapped ahead.
bool Cache::has_room_at_hand(i64 index, i64 count, bool in_last_block) {
  const i64 have = sequences_.tokens(index, 0), after = have + count;
  if (in_last_block && after > round_up(have, geometry_.groups[0].block_tokens)) return false;
  return count >= 0 && geometry_.map_ahead_tokens == 0 && geometry_.zero != Zero::always &&
         after <= geometry_.groups[0].max_tokens && table_->has_room(index, 0, after);
}

// Of a plain cache; false, and nothing has changed, where known tokens complete a block.
bool Cache::commit_in_block(i64 index, i64 count, const i32* tokens) {
  const bool known = prefix_.on && tokens != nullptr;
  if (known && completes(index, count)) return false;
  sequences_.committed(index, 0) += count;
  std::size_t at = published_.size();  // nothing is
  if (known) note_published(index, tokens, count, &at);
  return true;
}

bool Cache::extend_at_hand(i64 handle, i64 count, bool in_last_block) {
  fork_guard_.check("the allocator");
  const Lock lock = pool_->try_lock();
  if (!lock || !is_plain()) return false;
  const i64 index = sequences_.index(handle);
  if (!has_room_at_hand(index, count, in_last_block)) return false;
  sequences_.tokens(index, 0) += count;
  return true;
}

bool Cache::commit_at_hand(i64 handle, i64 count, const i32* tokens) {
  fork_guard_.check("the allocator");
  const Lock lock = pool_->try_lock();
  if (!lock || !is_plain()) return false;
  const i64 index = sequences_.index(handle), due = sequences_.tokens(index, 0) - sequences_.committed(index, 0);
  return count >= 0 && count <= due && commit_in_block(index, count, tokens);
}

bool Cache::advance_at_hand(i64 handle, i64 count, const i32* tokens, i64 num_tokens, bool in_last_block) {
  fork_guard_.check("the allocator");
  const Lock lock = pool_->try_lock();
  if (!lock || !is_plain()) return false;
  const i64 index = sequences_.index(handle), due = sequences_.tokens(index, 0) - sequences_.committed(index, 0);
  if ((tokens && num_tokens != due) || !has_room_at_hand(index, count, in_last_block)) return false;
  if (!commit_in_block(index, due, tokens)) return false;
  sequences_.tokens(index, 0) += count;
  return true;
}

// Entries that a window has dropped point at the trash blocks. Those are backed before the first can be dropped, when
// the sequence grows: commit() never needs memory.
bool Cache::lacks_trash(i64 g, i64 tokens) const {
  const i64 window = geometry_.groups[g].window_tokens;
  return window > 0 && tokens >= window && !table_->has_trash(g);
}

void Cache::extend(const i32* handles, const i32* counts, i64 n, i64 group) {
  mutate([&] {
    check_own_count(group, "extend");
    plan_extend(handles, counts, n, group);
    grow_planned(handles, counts, n, group);
  });
}

// What such a sequence would take is decided, and taken back before a driver hears of it.
bool Cache::can_fit(i64 tokens) {
  return mutate([&] {
    if (sequences_.count() == sequences_.capacity()) return false;
    for (const GroupGeometry& group : geometry_.groups) {
      if (group.growth == Growth::token && tokens > group.max_tokens) return false;
    }
    settle();
    Transaction tx(*pool_, *this);
    try {
      const i64 handle = sequences_.next_handle();
      tx.push({OpKind::open, 0, handle});
      const i64 index = sequences_.index(handle);
      for (i64 g = 0; g < groups_; ++g) {
        if (grows(g, -1)) set_length(index, g, tokens, tx);
      }
      if (tokens > 0 || has_state_) grow_one(index, tokens, -1, tx);  // a state needs room before the first token
    } catch (const OutOfMemory&) {
      return false;
    }
    return true;
  });
}

// The lengths come first: whoever looks for pages to spill then sees what is needed.
void Cache::grow_planned(const i32* handles, const i32* counts, i64 n, i64 group) {
  std::size_t at = 0;
  try {
    Lengthened lengths(*this, handles, counts, n, group);
    if (!needy_.empty()) {
      settle();
      Transaction tx(*pool_, *this);
      grow(counts, group, &at, tx);
      tx.commit();
    }
    lengths.done();
  } catch (const OutOfMemory& e) {
    explain_planned(at, counts, group, e);
  }
  if (geometry_.map_ahead_tokens > 0) map_ahead(n, group);
}

void Cache::add_lengths(const i32* counts, i64 n, i64 group, i64 sign) {
  const i64* const indices = indices_.data();
  for (i64 g = group_begin(group); g < group_end(group); ++g) {
    if (!grows(g, group)) continue;
    Sequences::Lengths* const lengths = sequences_.lengths(g, 0);
    for (i64 i = 0, step = groups_; i < n; ++i) lengths[indices[i] * step].tokens += sign * counts[i];
  }
}

// As a transaction would have it, of the lengths to be added: all of them, or none.
void Cache::log_lengths(const i32* handles, const i32* counts, i64 n, i64 group) {
  std::vector<Op>& log = pool_->log;
  const std::size_t most = log.size() + static_cast<std::size_t>(n * groups_);
  if (log.capacity() < most) log.reserve(std::max(most, 2 * log.capacity()));
  for (i64 g = group_begin(group); g < group_end(group); ++g) {
    for (i64 i = 0; i < n; ++i) {
      if (!grows(g, group) || counts[i] == 0) continue;
      const i64 tokens = sequences_.tokens(indices_[i], g);
      log.push_back({OpKind::length, static_cast<i32>(g), handles[i], tokens + counts[i], tokens});
    }
  }
}

// Makes room for the sequences in needy_; `*at` counts those that have it.
void Cache::grow(const i32* counts, i64 group, std::size_t* at, Transaction& tx) {
  for (; *at < needy_.size(); ++*at) grow_one(indices_[needy_[*at]], counts[needy_[*at]], group, tx);
}

// The length says already what there is to be room for.
void Cache::grow_one(i64 index, i64 count, i64 group, Transaction& tx) {
  if (is_simple_) {
    const i64 tokens = sequences_.tokens(index, 0);
    return table_->grow(index, 0, tokens - count, tokens, tx);
  }
  for (i64 g = group_begin(group); g < group_end(group); ++g) {
    if (grows(g, group)) {
      const i64 tokens = sequences_.tokens(index, g);
      table_->grow(index, g, tokens - count, tokens, tx);
      if (lacks_trash(g, tokens)) table_->back_trash(g, tx);
    } else if (geometry_.groups[g].growth == Growth::fixed && sequences_.tokens(index, g) == 0) {
      set_length(index, g, 1, tx);
      table_->grow(index, g, 0, 1, tx);
      set_committed(index, g, 1, tx);  // only now: a row that it comes to may be zeroed first
    }
  }
}

// After the last of needy_: the driver itself ran out.
void Cache::explain_planned(std::size_t at, const i32* counts, i64 group, const OutOfMemory& e) {
  if (needy_.empty()) throw e;
  const i64 i = needy_[std::min(at, needy_.size() - 1)];
  explain(indices_[i], counts[i], group, e.what());
}

void Cache::explain(i64 index, i64 count, i64 group, const std::string& why) {
  const i64 g = group < 0 ? token_group_ : group;
  const i64 have = sequences_.tokens(index, g);
  const i64 fits = table_->tokens_that_fit(index, g, pool_->available_pages(*table_));
  throw OutOfMemory("asked to extend sequence handle " + std::to_string(sequences_.handle_of(index)) + " from " +
                    std::to_string(have) + " by " + std::to_string(count) + " tokens: " + why +
                    "; alone it could grow by about " + std::to_string(std::max(i64{0}, fits - have)) +
                    ". Free or preempt a sequence, or raise the memory with set_memory()");
}

// Best effort: what it is called after has been done.
void Cache::map_ahead(i64 n, i64 group) {
  if (geometry_.map_ahead_tokens == 0 || (pool_->space() && !pool_->mapper().start())) return;
  try {
    try_map_ahead(n, group);
  } catch (const OutOfMemory&) {
    // Then every step maps for itself.
  } catch (const std::bad_alloc&) {
  }
}

void Cache::try_map_ahead(i64 n, i64 group) {
  std::vector<i64> touched;
  touched.reserve(n);
  Transaction tx(*pool_, *this);
  for (i64 i = 0; i < n; ++i) {
    bool any = false;
    for (i64 g = group_begin(group); g < group_end(group); ++g) {
      if (geometry_.groups[g].growth != Growth::token || !grows(g, group)) continue;
      const i64 have = sequences_.tokens(indices_[i], g);
      const i64 want = std::min(have + geometry_.map_ahead_tokens, geometry_.groups[g].max_tokens);
      any = (!table_->has_room(indices_[i], g, want) && table_->map_ahead(indices_[i], g, have, tx)) || any;
    }
    if (any) touched.push_back(indices_[i]);
  }
  if (touched.empty()) return;
  tx.expect_deferred();
  i64 job = 0;
  if (pool_->space()) job = pool_->mapper().post(pool_->shared_space(), tx.ops());
  tx.commit_deferred();
  for (i64 index : touched) {
    if (job != 0) table_->set_pending(index, job);
  }
}

i64 Cache::window_front(i64 index, i64 g, i64 committed) const {
  return std::max(sequences_.front(index, g),
                  window_first(geometry_.groups[g], geometry_.tail_guard_tokens, committed));
}

void Cache::commit(const i32* handles, const i32* counts, i64 n, i64 group, const i32* tokens) {
  mutate([&] {
    check_own_count(group, "commit");
    commit_all(handles, counts, n, group, tokens);
  });
}

void Cache::commit_all(const i32* handles, const i32* counts, i64 n, i64 group, const i32* tokens) {
  ++call_;
  indices_.resize(n);
  for (i64 i = 0; i < n; ++i) {
    const i64 index = indices_[i] = sequences_.index(handles[i]);
    check_once(index);
    for (i64 g = group_begin(group); g < group_end(group); ++g) {
      if (!grows(g, group)) continue;
      const i64 done = sequences_.committed(index, g), have = sequences_.tokens(index, g);
      if (counts[i] < 0 || done + counts[i] > have) {
        throw SpecError("asked to commit " + std::to_string(counts[i]) + " tokens of sequence handle " +
                        std::to_string(handles[i]) + "; " + std::to_string(have - done) +
                        " are reserved and not committed: extend() comes first");
      }
    }
  }
  const i32* const known = group < 0 ? known_of(tokens) : nullptr;
  find_moving(counts, n, group);
  if (const bool publishes = completes_any(counts, n, known); publishes || !moving_.empty()) {
    Transaction tx(*pool_, *this);
    write_committed(counts, n, group, known, tx);
    tx.commit();
  }
  finish_commit(counts, n, group, known);
}

// Whether a commit publishes a block; clears published_ and entered_.
bool Cache::completes_any(const i32* counts, i64 n, const i32* known) {
  published_.clear();
  entered_.clear();
  i64 i = 0;
  while (known && i < n && !completes(indices_[i], counts[i])) ++i;
  return known && i < n;
}

// Whose windows move on, in moving_; everybody where all is recorded.
void Cache::find_moving(const i32* counts, i64 n, i64 group) {
  moving_.clear();
  if (!has_window_ && !pool_->recording) return;
  for (i64 i = 0; i < n; ++i) {
    bool moves = pool_->recording;
    for (i64 g = group_begin(group); !moves && g < group_end(group); ++g) {
      if (geometry_.groups[g].window_tokens == 0 || !grows(g, group)) continue;
      const i64 index = indices_[i];
      moves = window_front(index, g, sequences_.committed(index, g) + counts[i]) != sequences_.front(index, g);
    }
    if (moves) moving_.push_back(i);
  }
}

// For the sequences in indices_: all that needs records. Needs no memory of the device. `known`: the ids, or null.
void Cache::write_committed(const i32* counts, i64 n, i64 group, const i32* known, Transaction& tx) {
  for (i64 i = 0; known && i < n; known += counts[i++]) {
    if (!completes(indices_[i], counts[i])) continue;
    if (published_.empty()) begin_use(tx);
    collect_published(indices_[i], known, counts[i]);
  }
  if (!published_.empty()) table_->publish(published_, tx);
  for (i64 i : moving_) commit_one(indices_[i], counts[i], group, tx);
}

// And what needs none, and cannot fail.
void Cache::finish_commit(const i32* counts, i64 n, i64 group, const i32* known) {
  for (i64 g = group_begin(group); g < group_end(group); ++g) {
    if (!grows(g, group)) continue;
    const i64* const indices = indices_.data();
    Sequences::Lengths* const lengths = sequences_.lengths(g, 0);
    i64 i = 0;
    const auto add_until = [&](i64 end) {
      for (const i64 step = groups_; i < end; ++i) lengths[indices[i] * step].committed += counts[i];
    };
    for (i64 moved : moving_) add_until(moved), ++i;  // these have it already
    add_until(n);
  }
  std::size_t at = 0;
  for (i64 i = 0; known && i < n; known += counts[i++]) note_published(indices_[i], known, counts[i], &at);
}

void Cache::commit_one(i64 index, i64 count, i64 group, Transaction& tx) {
  for (i64 g = group_begin(group); g < group_end(group); ++g) {
    if (!grows(g, group) || count == 0) continue;
    const i64 done = sequences_.committed(index, g) + count;
    const i64 old = sequences_.front(index, g), first = window_front(index, g, done);
    set_committed(index, g, done, tx);
    if (first != old) table_->drop_front(index, g, old, first, tx);
    set_front(index, g, first, tx);
  }
}

void Cache::truncate(i64 handle, i64 tokens) {
  mutate([&] { truncate_one(handle, tokens); });
}

void Cache::truncate_one(i64 handle, i64 tokens) {
  const i64 index = sequences_.index(handle);
  const i64 have = sequences_.tokens(index, token_group_);
  if (tokens < 0 || tokens > have) {
    throw SpecError("asked to truncate sequence handle " + std::to_string(handle) + " to " + std::to_string(tokens) +
                    " tokens; it has " + std::to_string(have));
  }
  for (i64 g = 0; g < groups_; ++g) {
    const i64 window = geometry_.groups[g].window_tokens, first = sequences_.front(index, g);
    if (first > 0 && tokens - window + 1 < first) {
      throw SpecError("asked to truncate sequence handle " + std::to_string(handle) + " to " + std::to_string(tokens) +
                      " tokens, but its sliding window of " + std::to_string(window) + " has dropped tokens before " +
                      std::to_string(first) + "; the least that would do is " + std::to_string(first + window - 1));
    }
  }
  collect_leaving(handle, index, tokens);
  if (table_->pending(index) != 0) settle();  // shared pages behind the length may be unmapped
  Transaction tx(*pool_, *this);
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth != Growth::token) continue;
    table_->shrink(index, g, have, tokens, tx);
    set_committed(index, g, std::min(tokens, sequences_.committed(index, g)), tx);
    set_length(index, g, tokens, tx);
  }
  retract_leaving(index, tx);
  tx.commit();
  note_truncated(index, have, tokens);
}

}  // namespace kvmem
