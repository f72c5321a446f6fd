// What is done with cached blocks besides sharing them: pins, snapshots, retention, forgetting, telling others.

#include "cache.h"

namespace kvmem {
namespace {

constexpr i64 kAtOnce = 1024;  // blocks to forget in one transaction: its records take 40 bytes each

}  // namespace

i64 Cache::pin_node(i32 node, i64* pinned) {
  const auto pin = pins_.emplace(pins_seen_ + 1, node).first;
  i32 x = node;
  try {
    for (; !index_.is_root(x); x = index_.parent(x)) index_.pin(x);
  } catch (...) {  // no memory: those behind it are pinned, the last one first
    index_.undo_pins(node, x);
    pins_.erase(pin);
    throw;
  }
  index_.enter(x);
  *pinned = (index_.ordinal(node) + 1) * block_tokens();
  return ++pins_seen_;
}

i64 Cache::pin(i64 handle, i64 tokens, i64* pinned) {
  return mutate([&] {
    const i64 index = sequences_.index(handle);
    const Content& c = contents_[index];
    if (tokens > c.known || !prefix_.on) {
      throw SpecError("asked to pin the first " + std::to_string(tokens) + " tokens of sequence handle " +
                      std::to_string(handle) + "; of " + std::to_string(c.known) +
                      " it is known which they are: commit() token ids instead of counts, with prefix_cache=True");
    }
    const i64 blocks = (tokens < 0 ? c.known : tokens) / block_tokens();
    i32 node = c.leaf;
    while (index_.ordinal(node) >= blocks) node = index_.parent(node);
    const i64 pin = pin_node(node, pinned);
    return pin;
  });
}

i64 Cache::pin(const i32* tokens, i64 n, const PrefixKey& key, i64* pinned) {
  return mutate([&] {
    const i32 root = prefix_.on ? index_.find_root(key) : kNoNode;
    const i64 wanted = n / block_tokens() * block_tokens();
    const i64 found = find_cached(root, tokens, wanted + 1).tokens;
    if (root == kNoNode || found < wanted) {
      throw SpecError("asked to pin " + std::to_string(wanted) + " tokens, of which the first " +
                      std::to_string(found) + " are cached: compute and commit them, then pin");
    }
    const i64 pin = pin_node(chain_.empty() ? root : chain_.back(), pinned);
    return pin;
  });
}

void Cache::unpin(i64 pin) {
  mutate([&] {
    const auto found = pins_.find(pin);
    if (found == pins_.end()) throw StaleHandle("pin " + std::to_string(pin) + " was given up before");
    i32 node = found->second;
    pins_.erase(found);
    while (!index_.is_root(node)) {
      const i32 before = index_.parent(node);
      index_.unpin(node);
      if (keeps_unheld_ && index_.used(node)) table_->offer(node);
      node = before;
    }
    index_.leave(node);
  });
}

void Cache::snapshot(i64 handle) {
  mutate([&] {
    const i64 index = sequences_.index(handle);
    const i64 tokens = sequences_.committed(index, token_group_), known = contents_[index].known;
    if (!prefix_.on || !has_state_) {
      throw SpecError(prefix_.on
                          ? "snapshot: no group of this spec has a state of fixed size"
                          : "snapshot: nothing is shared here (prefix_cache is off, or the spec does not allow it)");
    }
    if (known != tokens || tokens == 0 || tokens % block_tokens() != 0 ||
        sequences_.tokens(index, token_group_) != tokens) {
      throw SpecError("snapshot: sequence handle " + std::to_string(handle) + " has " + std::to_string(tokens) +
                      " committed tokens, of which " + std::to_string(known) + " are known, and " +
                      std::to_string(sequences_.tokens(index, token_group_)) +
                      " in all; all must be committed by their ids, at a multiple of " +
                      std::to_string(block_tokens()));
    }
    if (contents_[index].state_ahead) {
      throw SpecError("snapshot: sequence handle " + std::to_string(handle) +
                      " was truncated, and its state has seen what was cut off: put the state of " +
                      std::to_string(tokens) + " tokens back and go on; it can be kept after the next commit()");
    }
    settle();
    collect_chain(index);
    Transaction tx(*pool_, *this);
    table_->snapshot(index, chain_, tx);
    tx.commit();
  });
}

void Cache::apply_retention(const Content& content, i32 node) {
  const i64 first = index_.ordinal(node) * block_tokens();
  for (const Retention& r : content.retained) {
    if (r.start <= first && first + block_tokens() <= r.end) index_.retain(node, r.priority, r.seconds);
  }
}

void Cache::retain(i64 handle, i64 start, i64 end, int priority, double seconds) {
  mutate([&] {
    const i64 index = sequences_.index(handle);
    Content& c = contents_[index];
    if (start < 0 || end <= start || priority < 0 || priority > 100 || !(seconds > 0)) {
      throw SpecError("retain: tokens [" + std::to_string(start) + ", " + std::to_string(end) + ") at priority " +
                      std::to_string(priority) + "; must be a range, a priority from 0 to 100 and a time above 0");
    }
    collect_chain(index);
    index_.expect_retention();
    c.retained.push_back({start, end, priority, seconds});
    for (i32 node : chain_) apply_retention(c, node);
  });
}

i64 Cache::clear_cache() {
  return mutate([&] {
    settle();
    i64 blocks = 0;
    for (i32 node = index_.victim(); node != kNoNode;) {
      Transaction tx(*pool_, *this);
      for (i64 n = 0; n < kAtOnce && node != kNoNode; ++n, ++blocks, node = index_.victim()) table_->forget(node, tx);
      tx.commit();
    }
    if (index_.empty()) index_.events().cleared();
    return blocks;
  });
}

// ---- telling others ----------------------------------------------------------------------------

EventRecords Cache::drain_events(i64 max, bool restart, std::unordered_map<i32, PrefixKey>* roots) {
  Lock lock = enter(true);
  EventRecords records = index_.events().drain(
      max,
      [this](EventRecords& out) {
        for (i32 root : index_.roots()) {
          for (i32 node : index_.below(root)) tell_resident(node, out);
        }
      },
      restart);
  try {
    for (i32 number : records.roots) {
      if (number >= 0) roots->emplace(number, index_.root_key(number));
    }
  } catch (...) {
    index_.events().undo_drain();
    throw;
  }
  if (index_.events().size() == 0) index_.forget_roots();
  return records;
}

void Cache::tell_resident(i32 node, EventRecords& out) const {
  const i32 before = index_.parent(node), parent = index_.is_root(before) ? kNoNode : before;
  std::vector<i32> tokens(block_tokens());
  index_.copy_tokens(node, block_tokens(), tokens.data());
  bool any = false;
  for (i64 g = 0; g < groups_; ++g) {
    const bool here = geometry_.groups[g].growth == Growth::token && table_->has(node, g);
    if (!here) continue;
    out.stored(node, parent, index_.root_number(node), static_cast<i32>(g), index_.ordinal(node), tokens.data());
    any = true;
  }
  if (!any) {
    out.stored(node, parent, index_.root_number(node), -1, index_.ordinal(node), tokens.data());
  }
}

// ---- proof -----------------------------------------------------------------------------------

void Cache::check_content(std::vector<std::string>* out) const {
  std::vector<i32> users(index_.capacity(), 0);
  const auto count = [&](i32 node) {
    for (; node != kNoNode; node = index_.parent(node)) ++users[node];
  };
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    const Content& c = contents_[index];
    if (c.root == kNoNode) continue;
    count(c.leaf);
    const i64 tokens = index_.is_root(c.leaf) ? 0 : (index_.ordinal(c.leaf) + 1) * block_tokens();
    if (tokens != c.known - c.known % block_tokens() || c.known > sequences_.committed(index, token_group_)) {
      out->push_back("sequence handle " + std::to_string(sequences_.handle_of(index)) +
                     ": what is known of its tokens does not add up");
    }
  }
  for (const auto& [pin, node] : pins_) count(node);
  index_.check(users, out);
}

}  // namespace kvmem
