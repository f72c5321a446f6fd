#include "cache.h"

#include <algorithm>

namespace kvmem {
namespace {

i64 find_token_group(const Geometry& geometry) {
  for (std::size_t g = 0; g < geometry.groups.size(); ++g) {
    if (geometry.groups[g].growth == Growth::token) return static_cast<i64>(g);
  }
  return 0;
}

}  // namespace

Cache::Cache(Geometry geometry, std::shared_ptr<PagePool> pool, bool paged, i64 limit_pages, bool owns_pool)
    : geometry_(std::move(geometry)),
      pool_(std::move(pool)),
      paged_(paged),
      owns_pool_(owns_pool),
      groups_(static_cast<i64>(geometry_.groups.size())),
      token_group_(find_token_group(geometry_)),
      sequences_(geometry_.max_sequences, groups_),
      stamp_(geometry_.max_sequences, 0) {
  Lock lock(pool_->mutex);
  table_ = paged ? make_paged_table(geometry_, *pool_, sequences_) : make_virtual_table(geometry_, *pool_, sequences_);
  table_->limit_pages = limit_pages;
}

Cache::~Cache() {
  if (fork_guard_.forked()) {
    // The lock may be held by a thread that this process does not have. What is here belongs to the parent anyway.
    (void)table_.release();
    (void)new std::shared_ptr<PagePool>(pool_);
    return;
  }
  Lock lock(pool_->mutex);
  pool_->mapper().wait_idle();
  if (!owns_pool_) {
    try {
      settle();
      Transaction tx(*pool_, *this);
      for (i64 index = 0; index < sequences_.capacity(); ++index) {
        if (sequences_.live(index)) free_one(index, tx);
      }
      table_->unmap_all(tx);
      tx.commit();
    } catch (const Error&) {
      // A driver that cannot even unmap: its neighbours lose these pages, nobody gets them twice.
    }
  }
  table_.reset();
}

Cache::Lock Cache::enter() {
  fork_guard_.check("the allocator");
  Lock lock(pool_->mutex);
  if (pool_->mapper().has_failed()) settle();
  return lock;
}

void Cache::settle() {
  pool_->mapper().wait_idle();
  std::vector<Op> failed = pool_->mapper().take_failed();
  while (!failed.empty()) {
    const Op op = inverse(failed.back());
    failed.pop_back();
    pool_->apply(op, true);
    if (pool_->recording) pool_->log.push_back(op);
  }
}

void Cache::leave() {
  if (!geometry_.debug) return;
  std::vector<std::string> found;
  pool_->check(&found);
  table_->check(&found);
  if (!found.empty()) throw Error("broken invariant: " + found.front());
}

void Cache::check_group(i64 group) const {
  if (group < -1 || group >= groups_) {
    throw SpecError("group " + std::to_string(group) + " does not exist; there are " + std::to_string(groups_));
  }
}

// A sequence may stand in a batch once: twice would be decided on a length that is no longer true.
void Cache::check_once(i64 index) {
  if (stamp_[index] == call_) {
    throw SpecError("sequence handle " + std::to_string(sequences_.handle_of(index)) + " is named twice in one call");
  }
  stamp_[index] = call_;
}

void Cache::apply_table(const Op& op) {
  if (op.kind == OpKind::open) return sequences_.on_open(op.a, op.d == 1);
  if (op.kind == OpKind::close) return sequences_.on_close(op.a, op.d == 1);
  if (op.kind >= OpKind::bind && op.kind <= OpKind::unbind) return table_->apply(op);
  if (op.kind == OpKind::block) return table_->apply(op);
  check_group(op.at);
  const i64 index = sequences_.index(op.a);
  i64& value = op.kind == OpKind::length   ? sequences_.tokens(index, op.at)
               : op.kind == OpKind::commit ? sequences_.committed(index, op.at)
                                           : sequences_.front(index, op.at);
  if (value != op.c || op.b < 0 || op.b > geometry_.groups[op.at].max_tokens) {
    throw SpecError("sequence handle " + std::to_string(op.a) + ": a length of " + std::to_string(value) +
                    " cannot go from " + std::to_string(op.c) + " to " + std::to_string(op.b));
  }
  value = op.b;
}

void Cache::set_length(i64 index, i64 g, i64 tokens, Transaction& tx) {
  const i64 old = sequences_.tokens(index, g);
  if (old != tokens) tx.push({OpKind::length, static_cast<i32>(g), sequences_.handle_of(index), tokens, old});
}

void Cache::set_committed(i64 index, i64 g, i64 tokens, Transaction& tx) {
  const i64 old = sequences_.committed(index, g);
  if (old != tokens) tx.push({OpKind::commit, static_cast<i32>(g), sequences_.handle_of(index), tokens, old});
}

void Cache::set_front(i64 index, i64 g, i64 token, Transaction& tx) {
  const i64 old = sequences_.front(index, g);
  if (old != token) tx.push({OpKind::front, static_cast<i32>(g), sequences_.handle_of(index), token, old});
}

void Cache::open(i64 count, i32* handles) {
  Lock lock = enter();
  if (count < 0) throw SpecError("asked to open " + std::to_string(count) + " sequences");
  Transaction tx(*pool_, *this);
  for (i64 i = 0; i < count; ++i) {
    const i64 handle = sequences_.next_handle();
    tx.push({OpKind::open, 0, handle});
    handles[i] = static_cast<i32>(handle);
  }
  tx.commit();
  leave();
}

// Checks every argument and notes the indices; true when all of it already has room.
bool Cache::plan_extend(const i32* handles, const i32* counts, i64 n, i64 group) {
  check_group(group);
  ++call_;
  indices_.resize(n);
  bool room = geometry_.zero != Zero::always;
  for (i64 i = 0; i < n; ++i) {
    const i64 index = indices_[i] = sequences_.index(handles[i]);
    check_once(index);
    if (counts[i] < 0) {
      throw SpecError("asked to extend sequence handle " + std::to_string(handles[i]) + " by " +
                      std::to_string(counts[i]) + " tokens; use truncate() to shorten it");
    }
    for (i64 g = group_begin(group); g < group_end(group); ++g) {
      const GroupGeometry& geometry = geometry_.groups[g];
      const i64 have = sequences_.tokens(index, g);
      if (!grows(g, group)) {
        if (geometry.growth == Growth::fixed && have == 0) room = false;
        continue;
      }
      if (have + counts[i] > geometry.max_tokens) {
        throw SpecError("asked to extend sequence handle " + std::to_string(handles[i]) + " from " +
                        std::to_string(have) + " by " + std::to_string(counts[i]) + " tokens; it can hold " +
                        std::to_string(geometry.max_tokens) + " (max_tokens), so at most " +
                        std::to_string(geometry.max_tokens - have) + " more");
      }
      if (geometry.growth != Growth::token && have > 0 && counts[i] > 0) {
        throw SpecError("group " + std::to_string(g) + " is fixed after prefill and already holds " +
                        std::to_string(have) + " tokens");
      }
      room = room && table_->has_room(index, g, have + counts[i]);
    }
  }
  return room;
}

void Cache::extend(const i32* handles, const i32* counts, i64 n, i64 group) {
  Lock lock = enter();
  if (plan_extend(handles, counts, n, group)) {
    for (i64 i = 0; i < n; ++i) {
      for (i64 g = group_begin(group); g < group_end(group); ++g) {
        if (!grows(g, group) || counts[i] == 0) continue;
        i64& tokens = sequences_.tokens(indices_[i], g);
        if (pool_->recording) {
          pool_->log.push_back({OpKind::length, static_cast<i32>(g), handles[i], tokens + counts[i], tokens});
        }
        tokens += counts[i];
      }
    }
  } else {
    grow(handles, counts, n, group);
  }
  if (geometry_.map_ahead_tokens > 0) map_ahead(n, group);
  leave();
}

void Cache::grow(const i32* handles, const i32* counts, i64 n, i64 group) {
  settle();
  Transaction tx(*pool_, *this);
  i64 i = 0;
  std::string why;
  try {
    for (; i < n; ++i) grow_one(sequences_.index(handles[i]), counts[i], group, tx);
    tx.commit();
    return;
  } catch (const OutOfMemory& e) {
    tx.roll_back();
    why = e.what();
  }
  if (i == n) i = n - 1;  // the driver itself ran out
  explain(sequences_.index(handles[i]), counts[i], group, why);
}

// The length is pushed before the room is made: whoever looks for pages to spill then sees what is needed.
void Cache::grow_one(i64 index, i64 count, i64 group, Transaction& tx) {
  for (i64 g = group_begin(group); g < group_end(group); ++g) {
    if (grows(g, group)) {
      const i64 old = sequences_.tokens(index, g);
      set_length(index, g, old + count, tx);
      table_->grow(index, g, old, old + count, tx);
    } else if (geometry_.groups[g].growth == Growth::fixed && sequences_.tokens(index, g) == 0) {
      set_length(index, g, 1, tx);
      set_committed(index, g, 1, tx);
      table_->grow(index, g, 0, 1, tx);
    }
  }
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

void Cache::map_ahead(i64 n, i64 group) {
  Transaction tx(*pool_, *this);
  std::vector<i64> touched;
  for (i64 i = 0; i < n; ++i) {
    bool any = false;
    for (i64 g = group_begin(group); g < group_end(group); ++g) {
      if (geometry_.groups[g].growth == Growth::token && grows(g, group)) {
        any = table_->map_ahead(indices_[i], g, sequences_.tokens(indices_[i], g), tx) || any;
      }
    }
    if (any) touched.push_back(indices_[i]);
  }
  if (touched.empty()) return;
  std::vector<Op> ops = tx.ops();
  tx.commit_deferred();
  if (!pool_->space()) return;
  const i64 job = pool_->mapper().post(pool_->shared_space(), std::move(ops));
  for (i64 index : touched) table_->set_pending(index, job);
}

// The next token at position p attends to tokens p - window + 1 .. p. Whole blocks before that are not needed; the
// guard allows for kernels that load whole tiles.
i64 Cache::window_front(i64 index, i64 g, i64 committed) const {
  const GroupGeometry& geometry = geometry_.groups[g];
  const i64 old = sequences_.front(index, g);
  if (geometry.window_tokens == 0) return old;
  const i64 first = committed - geometry.window_tokens + 1 - geometry_.tail_guard_tokens;
  return std::max(old, first <= 0 ? i64{0} : first / geometry.block_tokens * geometry.block_tokens);
}

void Cache::commit(const i32* handles, const i32* counts, i64 n, i64 group) {
  Lock lock = enter();
  check_group(group);
  ++call_;
  bool windows = false;
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
      windows = windows || window_front(index, g, done + counts[i]) != sequences_.front(index, g);
    }
  }
  Transaction tx(*pool_, *this);
  for (i64 i = 0; i < n; ++i) {
    for (i64 g = group_begin(group); g < group_end(group); ++g) {
      if (!grows(g, group) || counts[i] == 0) continue;
      const i64 index = indices_[i], done = sequences_.committed(index, g) + counts[i];
      if (windows || pool_->recording) {
        const i64 old = sequences_.front(index, g), first = window_front(index, g, done);
        set_committed(index, g, done, tx);
        if (first != old) table_->drop_front(index, g, old, first, tx);
        set_front(index, g, first, tx);
      } else {
        sequences_.committed(index, g) = done;
      }
    }
  }
  tx.commit();
  leave();
}

void Cache::truncate(i64 handle, i64 tokens) {
  Lock lock = enter();
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
  if (table_->pending(index) > pool_->mapper().done()) settle();  // shared pages behind the length may be unmapped
  Transaction tx(*pool_, *this);
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth != Growth::token) continue;
    table_->shrink(index, g, have, tokens, tx);
    set_committed(index, g, std::min(tokens, sequences_.committed(index, g)), tx);
    set_length(index, g, tokens, tx);
  }
  tx.commit();
  leave();
}

void Cache::share_group(i64 parent, i64 child, i64 g, Transaction& tx) {
  // Tokens that are reserved but not committed are still to be written, so they cannot be shared.
  const i64 tokens = sequences_.committed(parent, g);
  if (tokens == 0) return;
  set_length(child, g, tokens, tx);
  set_committed(child, g, tokens, tx);
  if (geometry_.groups[g].growth == Growth::fixed) {  // a state is rewritten in place: it is copied whole
    table_->grow(child, g, 0, 1, tx);
    const std::vector<i64>& bytes = geometry_.groups[g].token_bytes;
    for (std::size_t a = 0; a < bytes.size(); ++a) {
      tx.push({OpKind::copy, static_cast<i32>(table_->first_arena(g) + a), table_->offset_bytes(child, g, a, 0),
               table_->offset_bytes(parent, g, a, 0), bytes[a]});
    }
    return;
  }
  set_front(child, g, sequences_.front(parent, g), tx);
  table_->share(parent, child, g, sequences_.front(parent, g), tokens, tx);
}

i64 Cache::fork(i64 handle) {
  Lock lock = enter();
  const i64 parent = sequences_.index(handle);
  settle();
  Transaction tx(*pool_, *this);
  std::string why;
  const i64 child = sequences_.next_handle();
  try {
    tx.push({OpKind::open, 0, child});
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth != Growth::fixed) share_group(parent, sequences_.index(child), g, tx);
    }
    for (i64 g = 0; g < groups_; ++g) {  // last: a row must be bound empty before pages of another are mapped in it
      if (geometry_.groups[g].growth == Growth::fixed) share_group(parent, sequences_.index(child), g, tx);
    }
    tx.commit();
  } catch (const OutOfMemory& e) {
    tx.roll_back();
    throw OutOfMemory("asked to fork sequence handle " + std::to_string(handle) + ": " + e.what() +
                      "; free or preempt a sequence, or raise the memory with set_memory()");
  }
  leave();
  return child;
}

void Cache::free_one(i64 index, Transaction& tx) {
  table_->close(index, tx);
  for (i64 g = 0; g < groups_; ++g) {
    set_front(index, g, 0, tx);
    set_committed(index, g, 0, tx);
    set_length(index, g, 0, tx);
  }
  tx.push({OpKind::close, 0, sequences_.handle_of(index)});
}

void Cache::free(const i32* handles, i64 n) {
  Lock lock = enter();
  ++call_;
  for (i64 i = 0; i < n; ++i) check_once(sequences_.index(handles[i]));
  Transaction tx(*pool_, *this);
  for (i64 i = 0; i < n; ++i) {
    free_one(sequences_.index(handles[i]), tx);
  }
  tx.commit();
  leave();
}

i64 Cache::tokens(i64 handle, i64 group) {
  Lock lock = enter();
  check_group(group);
  return sequences_.tokens(sequences_.index(handle), group < 0 ? token_group_ : group);
}

i64 Cache::committed(i64 handle, i64 group) {
  Lock lock = enter();
  check_group(group);
  return sequences_.committed(sequences_.index(handle), group < 0 ? token_group_ : group);
}

i64 Cache::first_token(i64 handle, i64 group) {
  Lock lock = enter();
  check_group(group);
  return sequences_.front(sequences_.index(handle), group < 0 ? token_group_ : group);
}

void Cache::lengths(const i32* handles, i64 n, i64 group, i64* tokens, i64* committed) {
  Lock lock = enter();
  check_group(group);
  const i64 g = group < 0 ? token_group_ : group;
  for (i64 i = 0; i < n; ++i) {
    const i64 index = sequences_.index(handles[i]);
    tokens[i] = sequences_.tokens(index, g);
    committed[i] = sequences_.committed(index, g);
  }
}

Placement Cache::place(i64 handle, i64 group) {
  Lock lock = enter();
  check_group(group);
  return table_->place(sequences_.index(handle), group < 0 ? token_group_ : group);
}

std::vector<i64> Cache::handles() {
  Lock lock = enter();
  std::vector<i64> found;
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    if (sequences_.live(index)) found.push_back(sequences_.handle_of(index));
  }
  return found;
}

i64 Cache::trim(i64 bytes) {
  Lock lock = enter();
  settle();
  const i64 page = pool_->page_bytes();
  const i64 wanted = bytes < 0 ? pool_->present_pages() : ceil_div(bytes, page);
  Transaction tx(*pool_, *this);
  const i64 free = pool_->free_pages();
  if (wanted > free) table_->spill(wanted - free, tx);
  const i64 given = pool_->give_back(wanted, tx);
  tx.commit();
  leave();
  return given * page;
}

void Cache::set_memory(i64 pages) {
  Lock lock = enter();
  settle();
  if (owns_pool_) {
    pool_->set_budget(pages);
  } else if (const i64 excess = table_->owned_pages - pages; excess > 0) {
    Transaction tx(*pool_, *this);
    if (const i64 freed = table_->spill(excess, tx); freed < excess) {
      throw OutOfMemory("asked for a limit of " + std::to_string(pages) + " pages, but live sequences hold " +
                        std::to_string(table_->owned_pages) + ", which is the smallest that would fit; free or " +
                        "preempt sequences first");
    }
    tx.commit();
  }
  table_->limit_pages = pages;
  leave();
}

CacheStats Cache::stats() {
  Lock lock = enter();
  const i64 page = pool_->page_bytes();
  CacheStats s;
  s.budget_bytes = pool_->budget_pages() * page;
  s.created_bytes = pool_->present_pages() * page;
  s.free_bytes = pool_->free_pages() * page;
  s.mapped_bytes = table_->owned_pages * page;
  s.parked_bytes = table_->parked_pages() * page;
  table_->count_bytes(&s.used_bytes, &s.shared_bytes);
  s.num_sequences = sequences_.count();
  s.driver_calls = pool_->driver_calls();
  s.physical_bytes = pool_->space() ? pool_->space()->driver().physical_bytes() : s.created_bytes;
  return s;
}

std::vector<std::string> Cache::check() {
  Lock lock = enter();
  std::vector<std::string> found;
  pool_->check(&found);
  table_->check(&found);
  return found;
}

i64 Cache::mapped_extent_bytes(i64 group, i64 arena_in_group) {
  Lock lock = enter();
  return table_->mapped_extent_slots(group, arena_in_group) * pool_->page_bytes();
}

void Cache::record() {
  Lock lock = enter();
  pool_->recording = true;
}

std::vector<Op> Cache::take_ops() {
  Lock lock = enter();
  std::vector<Op> ops;
  ops.swap(pool_->log);
  return ops;
}

void Cache::apply(const std::vector<Op>& ops) {
  Lock lock = enter();
  settle();
  Transaction tx(*pool_, *this);
  for (const Op& op : ops) {
    if (op.kind != OpKind::create) {
      tx.push(op);
      continue;
    }
    for (i64 page = op.a; page < op.a + op.b; ++page) {  // a replica may have created its pages ahead
      if (!pool_->present(page)) tx.push({OpKind::create, 0, page, 1});
    }
  }
  tx.commit();
  leave();
}

// What this step does for one sequence: every reserved token that is not committed, unless the caller says how many.
BatchRow Cache::step_of(i64 handle, i64 g, const i32* new_tokens) {
  const i64 index = sequences_.index(handle);
  const i64 done = sequences_.committed(index, g), have = sequences_.tokens(index, g);
  const bool chosen = new_tokens && geometry_.groups[g].growth == Growth::token;
  BatchRow row;
  row.fresh = geometry_.groups[g].growth == Growth::fixed ? 0 : chosen ? *new_tokens : have - done;
  row.length = chosen ? done + row.fresh : have;
  if (row.fresh < 0 || row.length > have) {
    throw SpecError("a step of " + std::to_string(row.fresh) + " new tokens for sequence handle " +
                    std::to_string(handle) + ", which has " + std::to_string(have - done) + " reserved");
  }
  row.first = sequences_.front(index, g);
  row.at = table_->place(index, g);
  return row;
}

BatchSizes Cache::fill(const i32* handles, i64 n, const i32* new_tokens, i64 group, i64 rows, const BatchBuffers& out) {
  Lock lock = enter();
  check_group(group);
  const i64 g = group < 0 ? token_group_ : group;
  rows = std::max(rows, n);
  if (rows > out.max_sequences) {
    throw SpecError("a batch of " + std::to_string(rows) + " rows does not fit buffers for " +
                    std::to_string(out.max_sequences));
  }
  // Padding rows read the trash block, and so do kernels that walk a table from its start, past what a window dropped.
  const bool trash = rows > n || std::any_of(handles, handles + n, [&](i32 handle) {
                       return sequences_.front(sequences_.index(handle), g) > 0;
                     });
  if (trash && !table_->has_trash(g)) {
    settle();
    Transaction tx(*pool_, *this);
    table_->back_trash(g, tx);
    tx.commit();
  }
  BatchWriter writer(out, geometry_.groups[g].block_tokens, geometry_.groups[g].row_tokens);
  for (i64 i = 0; i < n; ++i) writer.add(step_of(handles[i], g, new_tokens ? new_tokens + i : nullptr));
  for (i64 i = n; i < rows; ++i) writer.pad();
  return writer.sizes();
}

}  // namespace kvmem
