#include "allocator/allocator.h"

#include <algorithm>

namespace kvmem {
namespace {

i64 find_token_group(const Geometry& geometry) {
  for (std::size_t g = 0; g < geometry.groups.size(); ++g) {
    if (geometry.groups[g].growth == Growth::token) return static_cast<i64>(g);
  }
  return 0;
}

bool any_of(const Geometry& geometry, Growth growth) {
  return std::any_of(geometry.groups.begin(), geometry.groups.end(),
                     [growth](const GroupGeometry& g) { return g.growth == growth; });
}

PrefixOptions resolve(PrefixOptions options, const Geometry& geometry) {
  options.on = options.on && shared_unit(geometry) > 0;
  return options;
}

MatchEnd why_off(const PrefixOptions& options, const Geometry& geometry) {
  bool sizes;
  shared_unit(geometry, &sizes);
  return options.on && sizes ? MatchEnd::block_sizes : MatchEnd::off;
}

std::vector<GroupKind> kinds(const Geometry& geometry, bool shares) {
  std::vector<GroupKind> found;
  for (const GroupGeometry& group : geometry.groups) {
    found.push_back(!shares || group.growth == Growth::prefill ? GroupKind::none
                    : group.growth == Growth::fixed            ? GroupKind::state
                    : group.window_tokens > 0                  ? GroupKind::window
                                                               : GroupKind::full);
  }
  return found;
}

// How many blocks of the content index `bytes` of memory hold.
i64 blocks_in(const Geometry& geometry, i64 bytes) {
  i64 block_bytes = 0;
  for (const GroupGeometry& group : geometry.groups) {
    if (group.growth != Growth::token) continue;
    for (i64 token_bytes : group.token_bytes) block_bytes += token_bytes * unit_tokens(group);
  }
  return block_bytes == 0 ? 0 : bytes / block_bytes;
}

}  // namespace

std::atomic<i64> Cache::made_{0};

Cache::Cache(Geometry geometry, std::shared_ptr<PagePool> pool, bool paged, i64 limit_pages, bool owns_pool,
             const PrefixOptions& prefix)
    : geometry_(with_unit(geometry, prefix.on ? shared_unit(geometry) : 0)),
      pool_(std::move(pool)),
      paged_(paged),
      owns_pool_(owns_pool),
      groups_(static_cast<i64>(geometry_.groups.size())),
      token_group_(find_token_group(geometry_)),
      prefix_(resolve(prefix, geometry_)),
      off_(why_off(prefix, geometry_)),
      has_state_(any_of(geometry_, Growth::fixed)),
      has_window_(std::any_of(geometry_.groups.begin(), geometry_.groups.end(),
                              [](const GroupGeometry& g) { return g.window_tokens > 0; })),
      is_simple_(groups_ == 1 && geometry_.groups[0].growth == Growth::token && !has_window_ &&
                 geometry_.zero != Zero::always),
      sequences_(geometry_.max_sequences, groups_),
      index_(unit_tokens(geometry_.groups[token_group_]), kinds(geometry_, prefix_.on), prefix.policy, prefix.hash_bits,
             prefix.event_capacity, prefix_.on ? blocks_in(geometry_, limit_pages * geometry_.page_bytes) : 0),
      contents_(geometry_.max_sequences),
      tail_tokens_(std::min(index_.block_tokens(), geometry_.groups[token_group_].max_tokens)),
      tails_(geometry_.max_sequences * tail_tokens_),
      stamp_(geometry_.max_sequences, 0) {
  if (paged) geometry_.map_ahead_tokens = 0;  // blocks come from the pool's pages, which are mapped already or soon
  Lock lock = pool_->lock();
  table_ = paged ? make_paged_table(geometry_, *pool_, sequences_, index_)
                 : make_virtual_table(geometry_, *pool_, sequences_, index_);
  table_->limit_pages = limit_pages;
  table_->piece_pages = pages_at_once();
}

Cache::~Cache() {
  if (pool_->forked()) {
    table_.release();  // the parent's: nothing here may be unmapped, and its locks may be closed for ever
    return;
  }
  Lock lock = pool_->lock_to_close();
  pool_->settle();
  table_.reset();
}

Cache::Lock Cache::enter(bool look) {
  fork_guard_.check("the allocator");
  Lock lock = pool_->lock();
  if (!look) changes_.store(changes() + 1, std::memory_order_relaxed);  // the lock is held, so no increment is lost
  return lock;
}

Cache::Lock Cache::enter_still() {
  fork_guard_.check("the allocator");
  return pool_->lock();
}

void Cache::settle() { pool_->settle(); }

void Cache::leave() {
  if (!geometry_.debug) return;
  std::vector<std::string> found;
  pool_->check(&found);
  table_->check(&found);
  check_content(&found);
  if (!found.empty()) throw Error("broken invariant: " + found.front());
}

std::uint64_t Cache::state_digest() const {
  Hasher hash;
  pool_->digest(hash);
  sequences_.digest(hash);
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    const Content& c = contents_[index];
    hash.add(c.root, c.leaf, c.known, c.state_ahead, c.retained.size());
    for (i64 i = 0; c.root != kNoNode && i < remainder(c.known, block_tokens()); ++i) {
      hash.add(tails_[index * tail_tokens_ + i]);
    }
  }
  for (const auto& [pin, node] : pins_) {
    Hasher one;
    one.add(pin, node);
    hash.add_member(one);
  }
  hash.add(pins_seen_, lookup_tokens_, hit_tokens_, follows());
  return hash.value();
}

std::pair<std::uint64_t, i64> Cache::digest() {
  Lock lock = enter(true);
  return {state_digest(), disturbances()};
}

void Cache::check_unchanged(std::uint64_t before, i64 disturbed) const {
  if (disturbances() != disturbed || state_digest() == before) return;
  try {
    throw;
  } catch (const std::exception& e) {
    throw Error(std::string("broken invariant 5: a call that failed has changed something. It said: ") + e.what());
  }
}

void Cache::refuse_group(i64 group) const {
  throw SpecError("group " + std::to_string(group) + " does not exist; there are " + std::to_string(groups_));
}

void Cache::refuse_own_count(i64 group, const char* verb) const {
  throw SpecError(std::string(verb) + ": group " + std::to_string(group) +
                  (geometry_.groups[group].growth == Growth::token ? " grows with the tokens of the sequence"
                                                                   : " has one state of fixed size") +
                  "; only a group that is fixed after prefill has a count of its own. Leave group out");
}

void Cache::refuse_twice(i64 index) const {
  throw SpecError("sequence handle " + std::to_string(sequences_.handle_of(index)) + " is named twice in one call");
}

void Cache::apply_table(const Op& op, bool undo) {
  switch (op.kind) {
    case OpKind::length:
      return set_value(op, &Sequences::Lengths::tokens);
    case OpKind::commit:
      return set_value(op, &Sequences::Lengths::committed);
    case OpKind::front:
      set_value(op, &Sequences::Lengths::front);
      return table_->on_front(sequences_.index(op.a), op.at, op.c, op.b, undo);
    case OpKind::open:
      sequences_.on_open(op.a, op.d == 1);
      if (op.b != 0) set_lengths(op.a, op.b, op.c);
      return;
    case OpKind::close:
      if (op.b != 0) set_lengths(op.a, 0, 0);
      return sequences_.on_close(op.a, op.d == 1);
    case OpKind::use:
      return unuse_from(static_cast<std::size_t>(op.a));  // only ever undone
    default:
      return table_->apply(op, undo);
  }
}

void Cache::set_lengths(i64 handle, i64 tokens, i64 committed) {
  Sequences::Lengths& lengths = *sequences_.lengths(0, sequences_.index(handle));
  lengths.tokens = tokens, lengths.committed = committed;
}

void Cache::set_value(const Op& op, i64 Sequences::Lengths::* which) {
  check_group(op.at);
  i64& value = sequences_.lengths(op.at, sequences_.index(op.a))->*which;
  if (value != op.c || op.b < 0 || op.b > geometry_.groups[op.at].max_tokens) refuse_value(op, value);
  value = op.b;
}

void Cache::refuse_value(const Op& op, i64 value) const {
  throw SpecError("sequence handle " + std::to_string(op.a) + ": a length of " + std::to_string(value) +
                  " cannot go from " + std::to_string(op.c) + " to " + std::to_string(op.b));
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
  mutate([&] {
    if (count < 0) throw SpecError("asked to open " + std::to_string(count) + " sequences");
    RootUse root(index_, PrefixKey(), prefix_.on && count > 0);
    Transaction tx(*pool_, *this);
    for (i64 i = 0; i < count; ++i) {
      const i64 handle = sequences_.next_handle();
      tx.push({OpKind::open, 0, handle});
      handles[i] = static_cast<i32>(handle);
    }
    tx.commit();
    for (i64 i = 0; i < count; ++i) start_content(sequences_.index(handles[i]), root.node());
    root.keep(count);
  });
}

void Cache::share_group(i64 parent, i64 child, i64 g, Transaction& tx) {
  // Tokens that are reserved but not committed are still to be written, so they cannot be shared.
  const i64 tokens = sequences_.committed(parent, g);
  if (tokens == 0) return;
  set_length(child, g, tokens, tx);
  if (geometry_.groups[g].growth == Growth::fixed) {  // a state is rewritten in place: it is copied whole
    table_->grow(child, g, 0, 1, tx);
    set_committed(child, g, tokens, tx);  // only now: a row that it comes to may be zeroed first
    const std::vector<i64>& bytes = geometry_.groups[g].token_bytes;
    for (std::size_t a = 0; a < bytes.size(); ++a) {
      tx.push({OpKind::copy, static_cast<i32>(table_->first_arena(g) + a), table_->offset_bytes(child, g, a, 0),
               table_->offset_bytes(parent, g, a, 0), bytes[a]});
    }
    return;
  }
  set_committed(child, g, tokens, tx);
  set_front(child, g, sequences_.front(parent, g), tx);
  table_->share(parent, child, g, sequences_.front(parent, g), tokens, tx);
}

i64 Cache::fork(i64 handle) {
  return mutate([&] {
    const i64 parent = sequences_.index(handle);
    settle();
    try {
      return fork_one(parent);
    } catch (const OutOfMemory& e) {
      throw OutOfMemory("asked to fork sequence handle " + std::to_string(handle) + ": " + e.what() +
                        "; free or preempt a sequence, or raise the memory with set_memory()");
    }
  });
}

i64 Cache::fork_one(i64 parent) {
  const i64 handle = sequences_.next_handle();
  Content content = contents_[parent];
  // Its state has seen what is reserved, too, and stays behind with the parent.
  const bool reserved = sequences_.tokens(parent, token_group_) > sequences_.committed(parent, token_group_);
  content.state_ahead = content.state_ahead || reserved;
  i64 child = 0;
  collect_chain(parent);
  published_.clear();
  entered_.clear();
  {
    Transaction tx(*pool_, *this);
    begin_use(tx);
    for (i32 node : chain_) use(node);
    tx.push({OpKind::open, 0, handle});
    child = sequences_.index(handle);
    for (i32 node : chain_) published_.push_back({child, index_.ordinal(node), node});
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth != Growth::fixed) share_group(parent, child, g, tx);
    }
    for (i64 g = 0; g < groups_; ++g) {  // last: a row must be bound empty before pages of another are mapped in it
      if (geometry_.groups[g].growth == Growth::fixed) share_group(parent, child, g, tx);
    }
    table_->publish(published_, tx);
    tx.commit();
  }
  if (content.root != kNoNode) index_.enter(content.root);
  contents_[child] = std::move(content);
  std::copy_n(tail(parent), tail_tokens_, tail(child));
  return handle;
}

void Cache::free_one(i64 index, Transaction& tx) {
  table_->close(index, tx);
  for (i64 g = pool_->recording ? 0 : 1; g < groups_; ++g) {
    set_front(index, g, 0, tx);
    set_committed(index, g, 0, tx);
    set_length(index, g, 0, tx);
  }
  Op close{OpKind::close, 0, sequences_.handle_of(index)};
  if (!pool_->recording) {  // one record instead of three
    set_front(index, 0, 0, tx);
    close.b = sequences_.tokens(index, 0), close.c = sequences_.committed(index, 0);
  }
  tx.push(close);
}

void Cache::free(const i32* handles, i64 n) {
  mutate([&] {
    ++call_;
    for (i64 i = 0; i < n; ++i) check_once(sequences_.index(handles[i]));
    Transaction tx(*pool_, *this);
    for (i64 i = 0; i < n; ++i) free_one(sequences_.index(handles[i]), tx);
    tx.commit();
    for (i64 i = 0; i < n; ++i) leave_chain(sequences_.place_of(handles[i]));
  });
}

i64 Cache::tokens(i64 handle, i64 group) {
  Lock lock = enter(true);
  check_group(group);
  return sequences_.tokens(sequences_.index(handle), group < 0 ? token_group_ : group);
}

i64 Cache::committed(i64 handle, i64 group) {
  Lock lock = enter(true);
  check_group(group);
  return sequences_.committed(sequences_.index(handle), group < 0 ? token_group_ : group);
}

i64 Cache::first_token(i64 handle, i64 group) {
  Lock lock = enter(true);
  check_group(group);
  return sequences_.front(sequences_.index(handle), group < 0 ? token_group_ : group);
}

void Cache::lengths(const i32* handles, i64 n, i64 group, i64* tokens, i64* committed) {
  Lock lock = enter(true);
  check_group(group);
  const i64 g = group < 0 ? token_group_ : group;
  for (i64 i = 0; i < n; ++i) {
    const i64 index = sequences_.index(handles[i]);
    tokens[i] = sequences_.tokens(index, g);
    committed[i] = sequences_.committed(index, g);
  }
}

Placement Cache::place(i64 handle, i64 group) {
  Lock lock = enter_still();
  check_group(group);
  return table_->view(group < 0 ? token_group_ : group).at(sequences_.index(handle));
}

bool Cache::is_live(i64 handle) {
  Lock lock = enter(true);
  return sequences_.is_live(handle);
}

bool Cache::close() {
  fork_guard_.check("the allocator");
  const Lock lock = pool_->lock_to_close();
  changes_.store(changes() + 1, std::memory_order_relaxed);
  sequences_.close();
  return !pool_->is_poisoned();
}

double Cache::age_seconds(i64 handle) {
  Lock lock = enter(true);
  return sequences_.age_seconds(sequences_.index(handle));
}

std::vector<i64> Cache::handles() {
  Lock lock = enter(true);
  std::vector<i64> found;
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    if (sequences_.live(index)) found.push_back(sequences_.handle_of(index));
  }
  return found;
}

}  // namespace kvmem
