#include <algorithm>

#include "allocator/update.h"

namespace kvmem {
namespace {

Geometry resolve(const Geometry& geometry, bool paged, bool shares) {
  Geometry found = with_unit(geometry, shares ? shared_unit(geometry) : 0);
  if (paged) found.map_ahead_tokens = 0;  // blocks lie on mapped pages, so there is nothing to map ahead
  return found;
}

PrefixOptions resolve(PrefixOptions options, const Groups& groups) {
  options.on = options.on && shared_unit(groups.geometry()) > 0;
  return options;
}

MatchEnd why_off(const PrefixOptions& options, const Groups& groups) {
  bool sizes;
  shared_unit(groups.geometry(), &sizes);
  return options.on && sizes ? MatchEnd::block_sizes : MatchEnd::off;
}

std::vector<GroupKind> kinds(const Groups& groups, bool shares) {
  std::vector<GroupKind> found;
  for (const GroupGeometry& group : groups.geometry().groups) {
    found.push_back(!shares || group.growth == Growth::prefill ? GroupKind::none
                    : group.growth == Growth::fixed            ? GroupKind::state
                    : group.window_tokens > 0                  ? GroupKind::window
                                                               : GroupKind::full);
  }
  return found;
}

// Returns the number of the index's blocks for which `pages` pages are enough.
i64 blocks_in(const Groups& groups, i64 pages) {
  i64 block_bytes = 0;
  for (const GroupGeometry& group : groups.geometry().groups) {
    if (group.growth != Growth::token) continue;
    for (i64 token_bytes : group.token_bytes) block_bytes += token_bytes * unit_tokens(group);
  }
  return block_bytes == 0 ? 0 : pages * groups.geometry().page_bytes / block_bytes;
}

}  // namespace

Allocator::Allocator(const Geometry& geometry, std::shared_ptr<PagePool> pool, bool paged, i64 limit_pages,
                     bool owns_pool, const PrefixOptions& prefix)
    : groups_(resolve(geometry, paged, prefix.on)),
      pool_(std::move(pool)),
      owns_pool_(owns_pool),
      prefix_(resolve(prefix, groups_)),
      sequences_(geometry.max_sequences, groups_.count()),
      index_(unit_tokens(groups_[groups_.token_group()]), kinds(groups_, prefix_.on), prefix.policy, prefix.hash_bits,
             prefix.event_capacity, prefix_.on ? prefix.move_capacity : 0,
             prefix_.on ? blocks_in(groups_, limit_pages) : 0),
      table_(make_table(paged, limit_pages)),
      planner_(groups_, *pool_, sequences_, *table_),
      records_(groups_, *pool_, sequences_, *table_, planner_),
      growth_(groups_, *pool_, sequences_, *table_, records_, planner_, *this),
      matcher_(groups_, prefix_, why_off(prefix, groups_), index_, *table_),
      contents_(groups_, matcher_, sequences_, index_, *table_),
      admission_(groups_, matcher_, sequences_, index_, *table_, records_, growth_, contents_),
      pins_(groups_, matcher_, index_, *table_),
      follower_(groups_, *pool_, sequences_, index_, *table_, *this),
      table_diff_(groups_, sequences_, index_, planner_, *table_, paged && prefix_.on && !prefix_.append_only),
      filler_(groups_, *pool_, sequences_, *table_, *this),
      events_(groups_, index_, index_.events(), *table_),
      tiers_(groups_, matcher_, sequences_, index_, *table_, contents_),
      plan_(geometry.max_sequences) {}

std::unique_ptr<PageTable> Allocator::make_table(bool paged, i64 limit_pages) {
  const PoolLock lock = pool_->lock();
  std::unique_ptr<PageTable> table =
      paged ? make_paged_table(groups_.geometry(), *pool_, sequences_, index_, prefix_.append_only)
            : make_virtual_table(groups_.geometry(), *pool_, sequences_, index_);
  table->limit_pages = limit_pages;
  table->piece_pages = pages_at_once();
  return table;
}

Allocator::~Allocator() {
  if (pool_->forked()) {
    table_.release();  // it belongs to the parent: this process may unmap nothing, and its locks may be held for ever
    return;
  }
  const PoolLock lock = pool_->lock_to_close();
  pool_->settle();
  table_.reset();
}

// ---- how calls run -------------------------------------------------------------------------------

std::uint64_t Allocator::state_digest() const {
  Hasher hash;
  pool_->digest(hash);
  sequences_.digest(hash);
  contents_.digest(hash);
  pins_.digest(hash);
  hash.add(admission_.lookup_tokens(), admission_.hit_tokens(), follower_.follows());
  return hash.value();
}

std::vector<std::string> Allocator::violations() const {
  std::vector<std::string> found;
  pool_->check(&found);
  table_->check(&found);
  if (table_->slots()) table_->slots()->check(&found);
  contents_.check(&found);
  std::vector<i32> users(index_.capacity(), 0);
  contents_.count_users(&users);
  pins_.count_users(&users);
  index_.check(users, &found);
  return found;
}

void Allocator::apply_table(const Op& op, bool undo) {
  switch (op.kind) {
    case OpKind::length:
    case OpKind::commit:
    case OpKind::front:
    case OpKind::open:
    case OpKind::close:
      return records_.apply(op, undo);
    case OpKind::use:
      KVMEM_ASSERT(undo, "a `use` record is noted, not applied, so it can only be undone");
      return contents_.used.undo_to(static_cast<std::size_t>(op.a));
    default:
      return table_->apply(op, undo);
  }
}

// ---- opening and freeing -----------------------------------------------------------------------

void Allocator::open(i64 count, i32* handles) {
  update([&] {
    if (count < 0) throw SpecError("asked to open " + std::to_string(count) + " sequences");
    RootUse root(index_, PrefixKey(), prefix_.on && count > 0);
    Transaction tx(*pool_, *this);
    for (i64 i = 0; i < count; ++i) handles[i] = static_cast<i32>(records_.open(tx));
    tx.commit();
    for (i64 i = 0; i < count; ++i) contents_.start(sequences_.index(handles[i]), root.node());
    root.commit(count);
  });
}

i64 Allocator::admit(const i32* tokens, i64 n, const PrefixKey& key, i64* cached) {
  return update([&] {
    sequences_.next_handle();  // throws if all places are taken; the fallbacks below would not help
    for (Reuse reuse : {Reuse::all, Reuse::whole_blocks}) {
      try {
        return admit_one(tokens, n, key, reuse, 0, false, cached);
      } catch (const OutOfMemory&) {
        // The driver had no memory. Reusing less may need none.
      }
    }
    return admit_one(tokens, n, key, Reuse::none, 0, false, cached);
  });
}

i64 Allocator::begin(const i32* tokens, i64 n, const PrefixKey& key, i64 count, i64* cached) {
  return update([&] {
    admission_.check_length(count < 0 ? n : count);
    return admit_one(tokens, n, key, Reuse::all, count, true, cached);
  });
}

// One transaction. `grows`: with room for `count` more tokens than are cached or, with -1, for the whole prompt.
i64 Allocator::admit_one(const i32* tokens, i64 n, const PrefixKey& key, Reuse reuse, i64 count, bool grows,
                         i64* cached) {
  RootUse root(index_, key, prefix_.on);
  admission_.start(1);
  if (prefix_.on || grows) pool_->settle();
  {
    Transaction tx(*pool_, *this);
    admission_.open(tokens, n, key, root.node(), reuse, grows, tx);
    if (grows) admission_.make_room(count, tx);
    tx.commit();
  }
  root.commit(1);
  admission_.finish(tokens, root.node());
  const Admission::Admitted& one = admission_.admitted().front();
  const i64 index = sequences_.index(one.handle);
  if (grows) growth_.map_ahead(&index, 1, -1);
  *cached = one.cached;
  return one.handle;
}

i64 Allocator::admit_batch(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32* handles,
                           i32* cached) {
  return update([&]() -> i64 {
    admission_.check_prompts(counts, n);
    for (i64 some = n; some > 0; some /= 2) {
      try {
        return admit_first(tokens, counts, some, key, handles, cached);
      } catch (const OutOfMemory&) {
        // The driver had less memory than the metadata says. It may be enough for fewer prompts.
      }
    }
    return 0;
  });
}

// One transaction, so that an error undoes all admissions and the evictions made for them.
i64 Allocator::admit_first(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32* handles,
                           i32* cached) {
  RootUse root(index_, key, prefix_.on);
  admission_.start(n);
  plan_.indices.resize(n);
  pool_->settle();
  {
    Transaction tx(*pool_, *this);
    admission_.open_first(tokens, counts, n, key, root.node(), tx);
    tx.commit();
  }
  const std::vector<Admission::Admitted>& admitted = admission_.admitted();
  root.commit(static_cast<i64>(admitted.size()));
  admission_.finish(tokens, root.node());
  for (std::size_t i = 0; i < admitted.size(); ++i) {
    plan_.indices[i] = sequences_.index(admitted[i].handle);
    handles[i] = static_cast<i32>(admitted[i].handle);
    cached[i] = static_cast<i32>(admitted[i].cached);
  }
  growth_.map_ahead(plan_.indices.data(), static_cast<i64>(admitted.size()), -1);
  return static_cast<i64>(admitted.size());
}

i64 Allocator::fork(i64 handle) {
  return update([&] {
    const i64 parent = sequences_.index(handle), main = groups_.token_group();
    pool_->settle();
    contents_.prepare_fork(parent, sequences_.tokens(parent, main) > sequences_.committed(parent, main));
    i64 child = 0;
    try {
      Transaction tx(*pool_, *this);
      contents_.use_fork(tx);
      child = sequences_.index(records_.open(tx));
      for (const bool fixed : {false, true}) {  // a row must be bound while it is empty, so states come last
        for (i64 g = 0; g < groups_.count(); ++g) {
          if ((groups_[g].growth == Growth::fixed) == fixed) share_group(parent, child, g, tx);
        }
      }
      contents_.publish_fork(child, tx);
      tx.commit();
    } catch (const OutOfMemory& e) {
      throw OutOfMemory("asked to fork sequence handle " + std::to_string(handle) + ": " + e.what() +
                        "; free or preempt a sequence, or raise the memory with set_memory()");
    }
    contents_.finish_fork(parent, child);
    return sequences_.handle_of(child);
  });
}

// Gives the child the parent's committed tokens. Reserved ones are not written yet, so they cannot be shared.
void Allocator::share_group(i64 parent, i64 child, i64 g, Transaction& tx) {
  KVMEM_ASSERT(sequences_.tokens(child, g) == 0, "the child holds nothing in this group");
  const i64 tokens = sequences_.committed(parent, g);
  if (tokens == 0) return;
  records_.set_tokens(child, g, tokens, tx);
  if (groups_[g].growth == Growth::fixed) {  // a state is overwritten in place, so it is copied
    table_->grow(child, g, 0, 1, tx);
    records_.set_committed(child, g, tokens, tx);  // after grow(), which may zero the row it binds
    const std::vector<i64>& bytes = groups_[g].token_bytes;
    for (std::size_t a = 0; a < bytes.size(); ++a) {
      tx.push({OpKind::copy, static_cast<i32>(table_->first_arena(g) + a), table_->offset_bytes(child, g, a, 0),
               table_->offset_bytes(parent, g, a, 0), bytes[a]});
    }
    return;
  }
  records_.set_committed(child, g, tokens, tx);
  records_.set_front(child, g, sequences_.front(parent, g), tx);
  table_->share(parent, child, g, sequences_.front(parent, g), tokens, tx);
}

void Allocator::free(const i32* handles, i64 n) {
  update([&] {
    planner_.find_each_once(handles, n, &plan_);
    Transaction tx(*pool_, *this);
    for (i64 index : plan_.indices) records_.close(index, tx);
    for (i64 index : plan_.indices) {
      if (prefix_.append_only) contents_.hand_over(index, tx);
    }
    tx.commit();
    for (i64 index : plan_.indices) contents_.end(index);
  });
}

bool Allocator::close() {
  fork_guard_.check("the allocator");
  const PoolLock lock = pool_->lock_to_close();
  count_change();
  sequences_.close();
  return !pool_->is_poisoned();
}

// ---- queries ----------------------------------------------------------------------------------

void Allocator::check_usable() const {
  fork_guard_.check("the allocator");
  pool_->check_usable();
}

Sequences::Lengths Allocator::lengths(i64 handle, i64 group) {
  const PoolLock lock = lock_to_read();
  groups_.check(group);
  return *sequences_.lengths(groups_.one(group), sequences_.index(handle));
}

void Allocator::lengths(const i32* handles, i64 n, i64 group, i64* tokens, i64* committed) {
  const PoolLock lock = lock_to_read();
  groups_.check(group);
  for (i64 i = 0; i < n; ++i) {
    const Sequences::Lengths& now = *sequences_.lengths(groups_.one(group), sequences_.index(handles[i]));
    tokens[i] = now.tokens, committed[i] = now.committed;
  }
}

Placement Allocator::place(i64 handle, i64 group) {
  const PoolLock lock = lock_to_fill();
  groups_.check(group);
  return table_->view(groups_.one(group)).at(sequences_.index(handle));
}

TableChanges Allocator::table(i64 handle, i64 group) {
  const PoolLock lock = lock_to_read();
  groups_.check(group);
  const i64 index = sequences_.index(handle);
  TableChanges entries;
  entries.main = static_cast<i32>(groups_.one(group));
  for (i64 g = groups_.begin(group); g < groups_.end(group); ++g) table_diff_.add_table(0, index, g, &entries);
  return entries;
}

TableChanges Allocator::tables(const i32* handles, i64 n) {
  const PoolLock lock = lock_to_read();
  planner_.find(handles, n, &plan_);
  TableChanges entries;
  entries.main = static_cast<i32>(groups_.token_group());
  for (i64 g = 0; g < groups_.count(); ++g) {
    for (i64 i = 0; i < n; ++i) table_diff_.add_table(i, plan_.indices[i], g, &entries);
  }
  return entries;
}

bool Allocator::is_live(i64 handle) {
  const PoolLock lock = lock_to_read();
  return sequences_.is_live(handle);
}

double Allocator::age_seconds(i64 handle) {
  const PoolLock lock = lock_to_read();
  return sequences_.age_seconds(sequences_.index(handle));
}

std::vector<i64> Allocator::handles() {
  const PoolLock lock = lock_to_read();
  std::vector<i64> found;
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    if (!sequences_.live(index) || sequences_.is_pending(sequences_.handle_of(index))) continue;
    found.push_back(sequences_.handle_of(index));
  }
  return found;
}

void Allocator::common_blocks(const i32* handles, i64 n, i64 group, i64* out) {
  const PoolLock lock = lock_to_read();
  groups_.check(group);
  planner_.find(handles, n, &plan_);
  filler_.find_common_blocks(plan_.indices, groups_.one(group), out);
}

void Allocator::cascade_order(const i32* handles, i64 n, i64 group, i64* order) {
  const PoolLock lock = lock_to_read();
  groups_.check(group);
  planner_.find(handles, n, &plan_);
  filler_.find_cascade_order(plan_.indices, groups_.one(group), order);
}

}  // namespace kvmem
