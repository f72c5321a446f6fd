// What an allocator holds, how much it may hold, and following another allocator's decisions.

#include <algorithm>

#include "cache.h"

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

i64 Cache::trim(i64 bytes) {
  return mutate([&] {
    settle();
    const i64 page = pool_->page_bytes();
    const i64 wanted = bytes < 0 ? pool_->present_pages() : ceil_div(bytes, page);
    Transaction tx(*pool_, *this);
    const i64 free = pool_->free_pages();
    if (wanted > free) table_->spill(wanted - free, tx);
    const i64 given = pool_->give_back(wanted, tx);
    tx.commit();
    return given * page;
  });
}

void Cache::set_memory(i64 pages) {
  mutate([&] {
    settle();
    if (owns_pool_) {
      pool_->set_budget(pages);
    } else if (const i64 excess = table_->owned_pages - pages; excess > 0) {
      Transaction tx(*pool_, *this);
      if (const i64 freed = table_->spill(excess, tx); freed < excess) {
        throw OutOfMemory("asked for a limit of " + std::to_string(pages) + " pages, but live sequences hold " +
                          std::to_string(table_->owned_pages) + ", which is the smallest that would fit; free or " +
                          "preempt sequences first, or compact()");
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
  s.budget_bytes = pool_->budget_pages() * page;
  s.created_bytes = pool_->present_pages() * page;
  s.free_bytes = pool_->free_pages() * page;
  s.mapped_bytes = table_->owned_pages * page;
  s.parked_bytes = table_->parked_pages() * page;
  table_->count_bytes(&s.used_bytes, &s.shared_bytes);
  i64 token_bytes = 0;
  for (const GroupGeometry& group : geometry_.groups) {
    for (i64 bytes : group.token_bytes) token_bytes += group.growth == Growth::token ? bytes : 0;
  }
  s.cached_blocks = index_.cached();
  s.cached_bytes = index_.cached() * block_tokens() * token_bytes;
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
  Lock lock = enter();
  return table_->mapped_extent_slots(group, arena_in_group) * pool_->page_bytes();
}

void Cache::record() {
  Lock lock = enter();
  pool_->recording = true;
}

std::vector<Op> Cache::take_ops() {
  Lock lock = enter(true);
  std::vector<Op> ops;
  ops.swap(pool_->log);
  return ops;
}

void Cache::apply(const std::vector<Op>& ops) {
  mutate([&] {
    settle();
    if (!index_.empty()) {
      throw SpecError(
          "an allocator that follows the ops of another must not know what its own sequences hold: commit "
          "counts instead of token ids, or make it with prefix_cache=False");
    }
    Transaction tx(*pool_, *this);
    try {
      follow(ops, tx);
    } catch (const StaleHandle& e) {
      throw SpecError(std::string("the ops do not follow from here: ") + e.what());
    }
    tx.commit();
  });
}

void Cache::look_at_tails(i64 g) {
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    if (sequences_.live(index)) table_->look_at_tail(index, g);
  }
}

void Cache::follow(const std::vector<Op>& ops, Transaction& tx) {
  struct Growth {
    i64 handle, group, token;
    std::vector<i64> shared;
  };
  std::vector<Growth> grown;
  for (const Op& op : ops) {
    if ((op.kind == OpKind::open || op.kind == OpKind::close) && op.d != 0) {
      throw SpecError("open and close of a list carry no fourth number");
    }
    const bool grows = op.kind == OpKind::length && op.b > op.c;
    if (grows) check_group(op.at);
    if (grows && op.c == sequences_.tokens(sequences_.index(op.a), op.at)) {  // else it is refused below
      grown.push_back({op.a, op.at, op.c, table_->shared_pieces(sequences_.index(op.a), op.at, op.c)});
    }
    if (op.kind != OpKind::create || op.a < 0 || op.b <= 0 || op.b > pool_->budget_pages()) {
      tx.push(op);  // which refuses a create like that
      continue;
    }
    for (i64 page = op.a; page < op.a + op.b; ++page) {  // a replica may have created its pages ahead
      if (!pool_->present(page)) tx.push({OpKind::create, 0, page, 1});
    }
  }
  // A list that lacks a record may leave a sequence with a length and no memory: whoever writes there would be lost.
  for (const Op& op : ops) {
    if (op.kind == OpKind::block && op.c != 0) {  // the block may be the tail of any other sequence
      const i64 inside = op.b * geometry_.groups[op.at].block_tokens + 1;
      const std::vector<i64> shared = table_->shared_pieces(sequences_.place_of(op.a), op.at, inside);
      if (std::any_of(shared.begin(), shared.end(), [](i64 piece) { return piece >= 0; })) look_at_tails(op.at);
    }
    if (op.kind == OpKind::bind) {  // the row may come with pages that another one shows
      for (i64 g = 0; g < groups_; ++g) table_->look_at_tail(sequences_.place_of(op.a), g);
    }
    if ((op.kind == OpKind::length && op.b < op.c) || op.kind == OpKind::front) {  // it holds more than it needs now
      table_->look_at_tail(sequences_.place_of(op.a), op.at);
    }
    if ((op.kind == OpKind::map || op.kind == OpKind::unmap) && !table_->is_whole(op)) {
      throw SpecError("the ops lack a record: arena " + std::to_string(op.at) + " would be left mapped in part");
    }
  }
  for (const Growth& g : grown) {  // a page or block that others read must have given way to a copy
    const i64 index = sequences_.place_of(g.handle);
    if (!sequences_.live(index) || sequences_.handle_of(index) != g.handle) continue;
    const std::vector<i64> now = table_->shared_pieces(index, g.group, g.token);
    for (std::size_t i = 0; i < std::min(now.size(), g.shared.size()); ++i) {
      if (now[i] < 0 || now[i] != g.shared[i]) continue;
      throw SpecError("the ops lack a record: sequence handle " + std::to_string(g.handle) +
                      " would grow in memory that another one reads");
    }
  }
  ++call_;
  for (const Op& op : ops) {
    if (is_physical(op.kind)) continue;
    const i64 index = sequences_.place_of(op.a);
    if (stamp_[index] == call_) continue;
    stamp_[index] = call_;
    for (i64 g = 0; g < groups_; ++g) {
      const i64 first = sequences_.front(index, g), done = sequences_.committed(index, g);
      const i64 tokens = sequences_.tokens(index, g);
      if (first > done || done > tokens || (tokens > 0 && !sequences_.live(index)) || !table_->holds(index, g)) {
        throw SpecError("the ops lack a record: sequence handle " + std::to_string(op.a) +
                        " would be left with a length that its memory does not match");
      }
    }
  }
}

}  // namespace kvmem
