// The calls of an allocator about cached content, memory and recorded ops.

#include <algorithm>

#include "allocator/update.h"

namespace kvmem {
namespace {

constexpr i64 kEvictAtOnce = 1024;  // blocks evicted in one transaction, which takes about 0.5 ms

}  // namespace

// ---- cached content ------------------------------------------------------------------------------

Match Allocator::match(const i32* tokens, i64 n, const PrefixKey& key) {
  const PoolLock lock = lock_to_read();
  return matcher_.match(tokens, n, key);
}

Pins::Pinned Allocator::pin(i64 handle, i64 tokens) {
  return update([&] { return pins_.add(handle, tokens, sequences_.index(handle), contents_); });
}

Pins::Pinned Allocator::pin(const i32* tokens, i64 n, const PrefixKey& key) {
  return update([&] { return pins_.add(prefix_.on ? index_.find_root(key) : kNoNode, tokens, n, key); });
}

void Allocator::unpin(i64 pin) {
  update([&] { pins_.remove(pin); });
}

std::vector<Pins::Pinned> Allocator::pins() {
  const PoolLock lock = lock_to_read();
  return pins_.list();
}

void Allocator::snapshot(i64 handle) {
  update([&] {
    const i64 index = sequences_.index(handle);
    check_snapshot(handle, index);
    pool_->settle();
    std::vector<i32> chain;
    contents_.copy_chain(index, &chain);
    Transaction tx(*pool_, *this);
    table_->snapshot(index, chain, tx);
    tx.commit();
  });
}

void Allocator::check_snapshot(i64 handle, i64 index) const {
  const i64 main = groups_.token_group(), size = matcher_.block_tokens();
  const i64 have = sequences_.tokens(index, main), tokens = sequences_.committed(index, main);
  const i64 known = contents_.known(index);
  if (!prefix_.on || !groups_.has_state()) {
    throw SpecError(prefix_.on
                        ? "snapshot: no group of this spec has a state of fixed size"
                        : "snapshot: nothing is shared here (prefix_cache is off, or the spec does not allow it)");
  }
  if (known != tokens || tokens == 0 || tokens % size != 0 || have != tokens) {
    throw SpecError("snapshot: sequence handle " + std::to_string(handle) + " has " + std::to_string(tokens) +
                    " committed tokens, of which " + std::to_string(known) + " are known, and " + std::to_string(have) +
                    " in all; all must be committed by their ids, at a multiple of " + std::to_string(size));
  }
  if (contents_.state_ahead(index)) {
    throw SpecError("snapshot: sequence handle " + std::to_string(handle) +
                    " was truncated, or forked from one with reserved tokens, and its state may have seen more than "
                    "its " +
                    std::to_string(tokens) +
                    " tokens: restore the state of these tokens; it can be stored after the next commit()");
  }
}

void Allocator::retain(i64 handle, i64 start, i64 end, int priority, double seconds) {
  update([&] {
    const i64 index = sequences_.index(handle), size = matcher_.block_tokens();
    if (start < 0 || end <= start || priority < 0 || priority > 100 || !(seconds > 0)) {
      throw SpecError("retain: tokens [" + std::to_string(start) + ", " + std::to_string(end) + ") at priority " +
                      std::to_string(priority) + "; must be a range, a priority from 0 to 100 and a time above 0");
    }
    const Retention added{ceil_div(start, size), end / size, priority, seconds};
    if (added.first < added.end) contents_.retain(index, added);
  });
}

std::vector<Retention> Allocator::retained(i64 handle) {
  const PoolLock lock = lock_to_read();
  return contents_.retained(sequences_.index(handle));
}

i64 Allocator::clear_cache() {
  PoolLock lock = lock_to_change();
  pool_->settle();
  i64 blocks = 0;
  update_piece([&] {
    Transaction tx(*pool_, *this);
    table_->evict_truncated_ends(tx);
    tx.commit();
  });
  // Other threads may cache content as fast as this evicts it: after twice the present amount it no longer lets them
  // in, so that it ends.
  const i64 enough = 2 * index_.cached();
  for (i64 n = kEvictAtOnce; n == kEvictAtOnce;) {
    const i64 before = index_.cached();
    n = 0;
    update_piece([&] {
      Transaction tx(*pool_, *this);
      table_->evict_in_order(
          tx, [&] { return n < kEvictAtOnce; },
          [&](Item x) {
            table_->evict_item(x, tx);
            ++n;
            return Outcome::evicted;
          });
      tx.commit();
    });
    blocks += before - index_.cached();
    if (blocks <= enough) pool_->let_others_in(lock);
  }
  if (index_.empty()) index_.events().cleared();
  return blocks;
}

std::shared_ptr<EventBatch> Allocator::drain_events(i64 taken, i64 max, bool restart) {
  std::shared_ptr<EventBatch> done;
  const PoolLock lock = lock_to_read();
  return events_.drain(taken, max, restart, &done);
}

// ---- memory --------------------------------------------------------------------------------------

i64 Allocator::compact(i64 bytes) {
  return update([&] {
    pool_->settle();
    const i64 page = pool_->page_bytes();
    Transaction tx(*pool_, *this);
    const i64 freed = table_->compact(bytes < 0 ? pool_->present_pages() : ceil_div(bytes, page), tx);
    tx.commit();
    return freed * page;
  });
}

// Returns how many pages one piece of a longer call reclaims: about a millisecond of block work and driver calls.
i64 Allocator::pages_at_once() const {
  constexpr i64 kBlocks = 1024, kDriverCalls = 64;
  i64 block_bytes = 0;
  for (const GroupGeometry& group : groups_.geometry().groups) {
    for (i64 token_bytes : group.token_bytes) block_bytes += token_bytes * group.block_tokens;
  }
  return std::clamp(kBlocks * block_bytes / pool_->page_bytes(), i64{1}, pool_->space() ? kDriverCalls : kBlocks);
}

i64 Allocator::trim(i64 bytes) {
  PoolLock lock = lock_to_change();
  pool_->settle();
  const i64 page = pool_->page_bytes(), step = pages_at_once();
  i64 left = bytes < 0 ? pool_->present_pages() : ceil_div(bytes, page), given = 0;
  for (i64 now = step; now > 0 && left > 0;) {  // free pages go first
    update_piece([&] {
      Transaction tx(*pool_, *this);
      const i64 wanted = std::min(left, step), free = pool_->free_pages();
      if (wanted > free) table_->reclaim(wanted - free, true, tx);
      now = pool_->give_back(wanted, tx);
      tx.commit();
    });
    given += now, left -= now;
    pool_->let_others_in(lock);
  }
  return given * page;
}

void Allocator::set_memory(i64 pages) {
  PoolLock lock = lock_to_change();
  pool_->settle();
  if (owns_pool_) {
    pool_->shrink_in_pieces(lock, pages);
  } else {
    pool_->reclaim_in_pieces(lock, *table_, [&] { return table_->owned_pages - pages; });
  }
  update_piece([&] {
    if (owns_pool_) {
      pool_->set_budget(pages);
    } else if (const i64 excess = table_->owned_pages - pages; excess > 0) {
      Transaction tx(*pool_, *this);
      if (const i64 freed = table_->reclaim(excess, true, tx); freed < excess) {
        throw OutOfMemory("asked for a limit of " + std::to_string(pages) +
                          " pages, but live sequences and pins hold " + std::to_string(table_->owned_pages) +
                          ", which is the smallest that would fit; free or preempt sequences first, unpin(), or "
                          "compact()");
      }
      tx.commit();
    }
    table_->limit_pages = pages;
  });
}

AllocatorStats Allocator::stats() {
  const PoolLock lock = lock_to_read();
  const i64 page = pool_->page_bytes();
  AllocatorStats s;
  s.limit_bytes = std::min(table_->limit_pages, pool_->budget_pages() - pool_->held_by_others(*table_)) * page;
  s.budget_bytes = pool_->budget_pages() * page;
  s.created_bytes = pool_->present_pages() * page;
  s.free_bytes = pool_->free_pages() * page;
  s.mapped_bytes = table_->owned_pages * page;
  s.parked_bytes = table_->parked_pages() * page;
  for (i64 g = 0; g < groups_.count(); ++g) table_->count_bytes(g, &s.arena_used_bytes.emplace_back(), &s.shared_bytes);
  for (const std::vector<i64>& arenas : s.arena_used_bytes) {
    for (const i64 bytes : arenas) s.used_bytes += bytes;
  }
  s.held_bytes = table_->held_bytes();
  s.cached_beside_bytes = table_->cached_beside_bytes();
  s.cached_blocks = index_.cached();
  for (i64 g = 0; g < groups_.count(); ++g) {
    if (groups_[g].growth != Growth::token) continue;
    const i32 window = index_.window_of(g);
    const i64 blocks = window < 0 ? index_.cached() : index_.cached(window);
    for (i64 bytes : groups_[g].token_bytes) s.cached_bytes += blocks * matcher_.block_tokens() * bytes;
  }
  s.cached_bytes -= table_->common_bytes();
  s.pinned_blocks = index_.pinned_count();
  s.evicted_blocks = index_.evicted();
  s.lookup_tokens = admission_.lookup_tokens();
  s.hit_tokens = admission_.hit_tokens();
  s.num_sequences = sequences_.count();
  s.driver_calls = pool_->driver_calls();
  s.physical_bytes = pool_->space() ? pool_->space()->driver().physical_bytes() : s.created_bytes;
  return s;
}

std::vector<std::string> Allocator::check() {
  const PoolLock lock = lock_to_read();
  return violations();
}

std::pair<std::uint64_t, i64> Allocator::digest() {
  const PoolLock lock = lock_to_read();
  return {state_digest(), disturbances()};
}

i64 Allocator::mapped_extent_bytes(i64 group, i64 arena_in_group) {
  const PoolLock lock = lock_to_fill();
  return table_->mapped_extent_slots(group, arena_in_group) * pool_->page_bytes();
}

// ---- recording, and following another allocator ----------------------------------------------------

void Allocator::record() {
  const PoolLock lock = lock_to_change();
  pool_->recording = true;
}

std::vector<Op> Allocator::take_ops() {
  const PoolLock lock = lock_to_read();
  std::vector<Op> ops;
  if (pool_->log.empty()) return ops;
  ops.reserve(pool_->log.size() + 1);
  ops.push_back({OpKind::version, 0, kOpsVersion});
  ops.insert(ops.end(), pool_->log.begin(), pool_->log.end());
  pool_->log.clear();
  return ops;
}

void Allocator::apply(const std::vector<Op>& ops) {
  update([&] {
    pool_->settle();
    follower_.apply(ops);
  });
}

}  // namespace kvmem
