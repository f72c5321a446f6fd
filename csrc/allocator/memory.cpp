// What an allocator holds, and how much it may hold.

#include "allocator/allocator.h"

namespace kvmem {

i64 Cache::compact(i64 bytes) {
  return mutate([&] {
    settle();
    const i64 page = pool_->page_bytes();
    Transaction tx(*pool_, *this);
    const i64 freed = table_->compact(bytes < 0 ? pool_->present_pages() : ceil_div(bytes, page), tx);
    tx.commit();
    return freed * page;
  });
}

// How many pages a piece of a longer call gives up: about a millisecond's worth of blocks and of driver calls.
i64 Cache::pages_at_once() const {
  constexpr i64 kBlocks = 1024, kDriverCalls = 64;
  i64 block_bytes = 0;
  for (const GroupGeometry& group : geometry_.groups) {
    for (i64 token_bytes : group.token_bytes) block_bytes += token_bytes * group.block_tokens;
  }
  return std::clamp(kBlocks * block_bytes / pool_->page_bytes(), i64{1}, pool_->space() ? kDriverCalls : kBlocks);
}

i64 Cache::trim(i64 bytes) {
  Lock lock = enter();
  settle();
  const i64 page = pool_->page_bytes(), step = pages_at_once();
  i64 left = bytes < 0 ? pool_->present_pages() : ceil_div(bytes, page), given = 0;
  for (i64 now = step; now > 0 && left > 0;) {  // the free ones first: that costs nobody anything
    piece([&] {
      Transaction tx(*pool_, *this);
      const i64 wanted = std::min(left, step), free = pool_->free_pages();
      if (wanted > free) table_->spill(wanted - free, true, tx);
      now = pool_->give_back(wanted, tx);
      tx.commit();
    });
    given += now, left -= now;
    pool_->let_others_in(lock);
  }
  return given * page;
}

void Cache::set_memory(i64 pages) {
  Lock lock = enter();
  settle();
  if (owns_pool_) {
    pool_->shrink_in_pieces(lock, pages);
  } else {
    pool_->spill_in_pieces(lock, *table_, [&] { return table_->owned_pages - pages; });
  }
  piece([&] {
    if (owns_pool_) {
      pool_->set_budget(pages);
    } else if (const i64 excess = table_->owned_pages - pages; excess > 0) {
      Transaction tx(*pool_, *this);
      if (const i64 freed = table_->spill(excess, true, tx); freed < excess) {
        throw OutOfMemory("asked for a limit of " + std::to_string(pages) +
                          " pages, but live sequences and pins hold " + std::to_string(table_->owned_pages) +
                          ", which is the smallest that would fit; free or " +
                          "preempt sequences first, unpin(), or compact()");
      }
      tx.commit();
    }
    table_->limit_pages = pages;
  });
}

CacheStats Cache::stats() {
  Lock lock = enter(true);
  const i64 page = pool_->page_bytes();
  CacheStats s;
  s.limit_bytes = std::min(table_->limit_pages, pool_->budget_pages() - pool_->held_by_others(*table_)) * page;
  s.budget_bytes = pool_->budget_pages() * page;
  s.created_bytes = pool_->present_pages() * page;
  s.free_bytes = pool_->free_pages() * page;
  s.mapped_bytes = table_->owned_pages * page;
  s.parked_bytes = table_->parked_pages() * page;
  table_->count_bytes(&s.used_bytes, &s.shared_bytes);
  s.held_bytes = table_->held_bytes();
  s.cached_beside_bytes = table_->beside_bytes();
  s.cached_blocks = index_.cached();
  for (i64 g = 0; g < groups_; ++g) {
    const GroupGeometry& group = geometry_.groups[g];
    if (group.growth != Growth::token) continue;
    const i32 window = index_.window_of(g);
    const i64 blocks = window < 0 ? index_.cached() : index_.cached(window);
    for (i64 bytes : group.token_bytes) s.cached_bytes += blocks * block_tokens() * bytes;
  }
  s.cached_bytes -= table_->common_bytes();
  s.pinned_blocks = index_.pinned_count();
  s.evicted_blocks = index_.evicted();
  s.lookup_tokens = lookup_tokens_;
  s.hit_tokens = hit_tokens_;
  s.num_sequences = sequences_.count();
  s.driver_calls = pool_->driver_calls();
  s.physical_bytes = pool_->space() ? pool_->space()->driver().physical_bytes() : s.created_bytes;
  return s;
}

std::vector<std::string> Cache::check() {
  Lock lock = enter(true);
  std::vector<std::string> found;
  pool_->check(&found);
  table_->check(&found);
  check_content(&found);
  return found;
}

i64 Cache::mapped_extent_bytes(i64 group, i64 arena_in_group) {
  Lock lock = enter_still();
  return table_->mapped_extent_slots(group, arena_in_group) * pool_->page_bytes();
}

void Cache::record() {
  Lock lock = enter();
  pool_->recording = true;
}

std::vector<Op> Cache::take_ops() {
  Lock lock = enter(true);
  std::vector<Op> ops;
  if (pool_->log.empty()) return ops;
  ops.reserve(pool_->log.size() + 1);
  ops.push_back({OpKind::version, 0, kOpsVersion});
  ops.insert(ops.end(), pool_->log.begin(), pool_->log.end());
  pool_->log.clear();
  return ops;
}

}  // namespace kvmem
