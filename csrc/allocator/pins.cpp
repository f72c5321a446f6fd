// What is done with cached blocks besides sharing them: pins, snapshots, retention, forgetting, telling others.

#include <algorithm>

#include "allocator/allocator.h"

namespace kvmem {
namespace {

constexpr i64 kAtOnce = 1024;  // blocks to forget in one transaction: some 0.5 ms

}  // namespace

// Of the blocks in chain_, which can all be found.
i64 Cache::pin_chain(i64* pinned) {
  const i64 tokens = static_cast<i64>(chain_.size()) * block_tokens();
  const i32 node = chain_.back();
  const auto pin = pins_.emplace(pins_seen_ + 1, node).first;
  i32 x = node;
  try {
    table_->pin_end(node, true);
    for (; !index_.is_root(x); x = index_.parent(x)) index_.pin(x);
  } catch (...) {  // no memory: those behind it are pinned, the last one first
    if (x != node || index_.pinned(x)) index_.undo_pins(node, x);
    table_->pin_end(node, false);
    pins_.erase(pin);
    throw;
  }
  index_.enter(x);
  need_windows(chain_, tokens);
  *pinned = tokens;
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
    collect_chain(index);
    chain_.resize(blocks);
    Found found;
    if (blocks == 0) {
      throw SpecError("asked to pin " + std::to_string(tokens < 0 ? c.known : tokens) + " tokens of sequence handle " +
                      std::to_string(handle) + ": whole blocks of " + std::to_string(block_tokens()) +
                      " are kept, and this is none");
    }
    if (has_window_) look_along_windows();
    if (!find_end(blocks * block_tokens(), &found)) {
      const i64 longest = find_whole(blocks * block_tokens()).tokens;
      throw SpecError("asked to pin the first " + std::to_string(blocks * block_tokens()) +
                      " tokens of sequence handle " + std::to_string(handle) + ", of which " +
                      (has_state_ ? "no snapshot is kept: call snapshot() there first"
                                  : "a sliding window has passed what it would need: pin them while it reaches them") +
                      "; of its prefixes the longest that can be pinned now has " + std::to_string(longest) +
                      " tokens");
    }
    return pin_chain(pinned);
  });
}

i64 Cache::pin(const i32* tokens, i64 n, const PrefixKey& key, i64* pinned) {
  return mutate([&] {
    const i32 root = prefix_.on ? index_.find_root(key) : kNoNode;
    const i64 wanted = n / block_tokens() * block_tokens();
    const i64 found = find_cached(root, tokens, wanted + 1, placed(key.marks, tokens, n)).tokens;
    if (root == kNoNode || found < wanted || wanted == 0) {
      throw SpecError("asked to pin " + std::to_string(wanted) + " tokens, of which the first " +
                      std::to_string(found) + " are cached: compute and commit them, in whole blocks of " +
                      std::to_string(block_tokens()) + ", then pin");
    }
    return pin_chain(pinned);
  });
}

void Cache::unpin(i64 pin) {
  mutate([&] {
    const auto found = pins_.find(pin);
    if (found == pins_.end()) throw StaleHandle("pin " + std::to_string(pin) + " was given up before");
    chain_.clear();
    for (i32 node = found->second; !index_.is_root(node); node = index_.parent(node)) chain_.push_back(node);
    std::reverse(chain_.begin(), chain_.end());
    const i32 root = index_.parent(chain_.front());
    table_->pin_end(found->second, false);
    pins_.erase(found);
    unneed_windows(chain_, static_cast<i64>(chain_.size()) * block_tokens());
    for (auto x = chain_.rbegin(); x != chain_.rend(); ++x) {
      index_.unpin(*x);
      if (has_state_ && index_.used(*x)) table_->offer(*x);
    }
    index_.leave(root);
  });
}

std::vector<Cache::Pinned> Cache::pins() {
  Lock lock = enter(true);
  std::vector<Pinned> found;
  for (const auto& [pin, node] : pins_) found.push_back({pin, (index_.ordinal(node) + 1) * block_tokens()});
  std::sort(found.begin(), found.end(), [](const Pinned& a, const Pinned& b) { return a.pin < b.pin; });
  return found;
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
                      " was truncated, or forked from one with reserved tokens, and its state may have seen more than "
                      "its " +
                      std::to_string(tokens) +
                      " tokens: put their state back and go on; it can be kept after the next commit()");
    }
    settle();
    collect_chain(index);
    Transaction tx(*pool_, *this);
    table_->snapshot(index, chain_, tx);
    tx.commit();
  });
}

void Cache::apply_retention(const Content& content, i32 node) {
  const i64 ordinal = index_.ordinal(node);
  const auto found = std::partition_point(content.retained.begin(), content.retained.end(),
                                          [ordinal](const Retention& r) { return r.end <= ordinal; });
  if (found == content.retained.end() || ordinal < found->first) return;
  index_.retain(node, found->priority, found->seconds);
}

// It replaces what was said of the same blocks before.
void Cache::put_retention(const Retention& added, std::vector<Retention>* retained) {
  std::vector<Retention> kept;
  kept.reserve(retained->size() + 2);
  const auto keep = [&kept](Retention part, i64 first, i64 end) {
    part.first = first, part.end = end;
    if (first < end) kept.push_back(part);
  };
  for (const Retention& r : *retained) keep(r, r.first, std::min(r.end, added.first));
  kept.push_back(added);
  for (const Retention& r : *retained) keep(r, std::max(r.first, added.end), r.end);
  retained->swap(kept);
}

void Cache::retain(i64 handle, i64 start, i64 end, int priority, double seconds) {
  mutate([&] {
    const i64 index = sequences_.index(handle);
    Content& c = contents_[index];
    if (start < 0 || end <= start || priority < 0 || priority > 100 || !(seconds > 0)) {
      throw SpecError("retain: tokens [" + std::to_string(start) + ", " + std::to_string(end) + ") at priority " +
                      std::to_string(priority) + "; must be a range, a priority from 0 to 100 and a time above 0");
    }
    const Retention added{ceil_div(start, block_tokens()), end / block_tokens(), priority, seconds};
    if (added.first >= added.end) return;  // no whole block lies in it
    index_.expect_retention();
    chain_.clear();
    i32 node = c.leaf;
    for (; node != c.root && index_.ordinal(node) >= added.end; node = index_.parent(node)) {
    }
    for (; node != c.root && index_.ordinal(node) >= added.first; node = index_.parent(node)) chain_.push_back(node);
    put_retention(added, &c.retained);  // the last that may find no memory
    for (auto at = chain_.rbegin(); at != chain_.rend(); ++at) index_.retain(*at, priority, seconds);
  });
}

std::vector<Cache::Retention> Cache::retained(i64 handle) {
  Lock lock = enter(true);
  return contents_[sequences_.index(handle)].retained;
}

i64 Cache::clear_cache() {
  Lock lock = enter();
  settle();
  i64 blocks = 0;
  piece([&] {
    Transaction tx(*pool_, *this);
    table_->forget_cut_ends(tx);
    tx.commit();
  });
  // Others may cache as much as is forgotten here: then it comes to an end without them.
  const i64 enough = 2 * index_.cached();
  for (i64 n = kAtOnce; n == kAtOnce;) {
    const i64 before = index_.cached();
    n = 0;
    piece([&] {
      Transaction tx(*pool_, *this);
      table_->evict_in_order(
          tx, [&] { return n < kAtOnce; },
          [&](Item x) {
            table_->evict_item(x, tx);
            ++n;
            return Named::evicted;
          });
      tx.commit();
    });
    blocks += before - index_.cached();
    if (blocks <= enough) pool_->let_others_in(lock);
  }
  if (index_.empty()) index_.events().cleared();
  return blocks;
}

// ---- telling others ----------------------------------------------------------------------------

std::shared_ptr<Cache::EventBatch> Cache::drain_events(i64 taken, i64 max, bool restart) {
  auto batch = std::make_shared<EventBatch>();
  std::shared_ptr<EventBatch> done;  // freed without the lock
  Lock lock = enter(true);
  if (given_ && given_->number > taken && !restart) return given_;
  done.swap(given_);
  batch->number = batches_seen_;
  if (max == 0 && !restart) return batch;
  batch->records = index_.events().drain(
      max,
      [this](EventRecords& out) {
        for (i32 root : index_.roots()) {
          for (i32 node : index_.below(root)) tell_resident(node, out);
        }
      },
      restart);
  i32 last = -1;
  try {
    for (i32 number : batch->records.roots) {
      if (number >= 0 && number != last) batch->roots.emplace(last = number, index_.root_key(number));
    }
  } catch (...) {
    index_.events().undo_drain();
    throw;
  }
  index_.forget_roots();
  if (batch->records.size() > 0) batch->number = ++batches_seen_, given_ = batch;
  return batch;
}

void Cache::tell_resident(i32 node, EventRecords& out) const {
  const i32 before = index_.parent(node), parent = index_.is_root(before) ? kNoNode : before;
  std::vector<i32> tokens(block_tokens());
  index_.copy_tokens(node, block_tokens(), tokens.data());
  bool any = false;
  for (i64 g = 0; g < groups_; ++g) {
    const bool here = geometry_.groups[g].growth != Growth::prefill && table_->has(node, g);
    if (!here) continue;
    out.stored(node, parent, index_.root_number(node), static_cast<i32>(g), index_.ordinal(node), tokens.data(), 0,
               index_.tag(node));
    any = true;
  }
  if (!any) {
    out.stored(node, parent, index_.root_number(node), -1, index_.ordinal(node), tokens.data(), 0, index_.tag(node));
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
