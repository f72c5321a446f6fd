// Sharing what sequences have in common: admission with the longest cached prefix, publishing what is committed, taking
// it back. The content index says what is known, the page table where it lies.

#include <algorithm>

#include "cache.h"

namespace kvmem {

// ---- which blocks a sequence holds ---------------------------------------------------------------

void Cache::start_content(i64 index, i32 root) {
  Content& c = contents_[index];
  c.root = c.leaf = root;
  c.known = 0;
  c.retained.clear();
}

// The published blocks of a sequence, first one first, in chain_.
void Cache::collect_chain(i64 index) {
  chain_.clear();
  const Content& c = contents_[index];
  for (i32 node = c.leaf; node != c.root; node = index_.parent(node)) chain_.push_back(node);
  std::reverse(chain_.begin(), chain_.end());
}

void Cache::leave_chain(i64 index) {
  Content& c = contents_[index];
  while (c.leaf != c.root) {
    const i32 node = c.leaf;
    c.leaf = index_.parent(node);
    leave_node(node);
  }
  if (c.root != kNoNode) index_.leave(c.root);
  c = Content();
}

// ---- finding ---------------------------------------------------------------------------------

// Fills chain_ with known blocks that `tokens` begins with, of all but one token, and finds the memory of most of them.
Found Cache::find_cached(i32 root, const i32* tokens, i64 n) {
  chain_.clear();
  if (root == kNoNode) return Found();
  const i64 size = block_tokens(), most = n - 1;
  i32 last = root;
  i64 done = 0;
  for (; done + size <= most; done += size) {
    const i32 node = index_.find(last, tokens + done);
    if (node == kNoNode) break;
    chain_.push_back(last = node);
  }
  Found found = find_part(root, tokens, most);
  if (found.tokens > 0) return found;
  const Found whole = table_->find(chain_, done);
  // Others that begin like a block which a window has passed may still have the memory of theirs.
  while (has_window_ && static_cast<i64>(chain_.size()) * size > whole.tokens) {
    const i32 passed = chain_.back();
    chain_.pop_back();
    if (!index_.has_siblings(passed)) continue;
    found = find_part(root, tokens, most);
    if (found.tokens > 0) return found;
  }
  return whole;
}

// What is behind chain_ and part of one more block, which chain_ ends with then; else chain_ is as it was.
Found Cache::find_part(i32 root, const i32* tokens, i64 most) {
  const i64 done = static_cast<i64>(chain_.size()) * block_tokens();
  if (!prefix_.partial || has_state_ || done >= most) return Found();  // states stand at the end of whole blocks only
  index_.find_partial(chain_.empty() ? root : chain_.back(), tokens + done, most - done, &parts_);
  for (const PartOfBlock& part : parts_) {  // not all of them are where the tokens before them are
    chain_.push_back(part.node);
    const Found found = table_->find(chain_, done + part.tokens);
    if (found.tokens == done + part.tokens) return found;
    chain_.pop_back();
  }
  return Found();
}

PrefixMatch Cache::match(const i32* tokens, i64 n, const PrefixKey& key) {
  Lock lock = enter(true);
  PrefixMatch match;
  if (!prefix_.on) return match;
  const i32 root = index_.find_root(key);
  match.tokens = find_cached(root, tokens, n).tokens;
  match.end = why_not_more(key, root, tokens, n, match.tokens);
  return match;
}

// chain_ holds what find_cached() found.
MatchEnd Cache::why_not_more(const PrefixKey& key, i32 root, const i32* tokens, i64 n, i64 found) const {
  const i64 size = block_tokens(), most = n - 1, blocks = found / size;
  if (found >= most) return MatchEnd::complete;
  if (most - blocks * size < size) return MatchEnd::short_block;
  const i32 last = blocks == 0 ? root : chain_[blocks - 1];
  if (last != kNoNode && index_.find(last, tokens + blocks * size) != kNoNode) {  // known, but its memory does not do
    if (has_state_) return MatchEnd::no_snapshot;
    return has_window_ ? MatchEnd::window : MatchEnd::evicted;
  }
  if (index_.was_evicted(last, key, tokens + blocks * size)) return MatchEnd::evicted;
  return index_.longest_elsewhere(root, tokens, most) > blocks ? MatchEnd::other_salt : MatchEnd::never_seen;
}

// ---- admission -------------------------------------------------------------------------------

i64 Cache::admit(const i32* tokens, i64 n, const PrefixKey& key, i64* cached) {
  return mutate([&] {
    sequences_.next_handle();  // refuses where there is none
    for (Reuse reuse : {Reuse::all, Reuse::whole_blocks}) {
      try {
        return admit_at(tokens, n, key, reuse, cached);
      } catch (const OutOfMemory&) {
        // The driver had none. What is taken over less may need none of it.
      }
    }
    return admit_at(tokens, n, key, Reuse::none, cached);
  });
}

i64 Cache::admit_at(const i32* tokens, i64 n, const PrefixKey& key, Reuse reuse, i64* cached) {
  Admitted one;
  RootUse root(index_, key, prefix_.on);
  entered_.clear();
  if (prefix_.on) settle();
  try {
    Transaction tx(*pool_, *this);
    one = admit_one(tokens, n, root.node(), reuse, tx);
    tx.commit();
  } catch (...) {
    unenter_from(0);
    throw;
  }
  root.keep(1);
  finish_admission(one, tokens, root.node());
  *cached = one.found.tokens;
  return one.handle;
}

i64 Cache::admit_batch(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32* handles, i32* cached) {
  return mutate([&]() -> i64 {
    for (i64 i = 0; i < n; ++i) {
      if (counts[i] < 0)
        throw SpecError("prompt " + std::to_string(i) + " has " + std::to_string(counts[i]) + " tokens");
      const i64 most = geometry_.groups[token_group_].max_tokens;
      if (counts[i] <= most) continue;
      throw SpecError("prompt " + std::to_string(i) + " has " + std::to_string(counts[i]) +
                      " tokens; a sequence can hold " + std::to_string(most) + " (max_tokens)");
    }
    for (i64 some = n; some > 0; some /= 2) {
      try {
        return admit_some(tokens, counts, some, key, handles, cached);
      } catch (const OutOfMemory&) {
        // The driver had less than the books say. It may have enough for some of them.
      }
    }
    return 0;
  });
}

// In one transaction, so that an error takes all of them back, with what was given up for them.
i64 Cache::admit_some(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32* handles, i32* cached) {
  RootUse root(index_, key, prefix_.on);
  entered_.clear();
  admitted_.clear();
  admitted_.reserve(n);
  indices_.resize(n);
  settle();
  try {
    Transaction tx(*pool_, *this);
    const i32* prompt = tokens;
    for (i64 i = 0; i < n && sequences_.count() < sequences_.capacity(); prompt += counts[i++]) {
      const Transaction::Point before = tx.here();
      const std::size_t first = entered_.size();
      try {
        const Admitted one = admit_one(prompt, counts[i], root.node(), Reuse::all, tx);
        give_room(one, tx);
        admitted_.push_back(one);
      } catch (const OutOfMemory&) {  // as many as there is memory for
        tx.roll_back_to(before);
        unenter_from(first);
        break;
      }
    }
    tx.commit();
  } catch (...) {
    unenter_from(0);
    throw;
  }
  root.keep(static_cast<i64>(admitted_.size()));
  for (const Admitted& one : admitted_) {
    finish_admission(one, tokens, root.node());
    indices_[&one - admitted_.data()] = sequences_.index(one.handle);
    *handles++ = static_cast<i32>(one.handle);
    *cached++ = static_cast<i32>(one.found.tokens);
    tokens += one.tokens;
  }
  map_ahead(static_cast<i64>(admitted_.size()), -1);
  return static_cast<i64>(admitted_.size());
}

// Short of memory it takes less of what is cached.
Cache::Admitted Cache::admit_one(const i32* tokens, i64 n, i32 root, Reuse reuse, Transaction& tx) {
  Admitted one;
  one.handle = sequences_.next_handle();
  one.tokens = n;
  one.first = entered_.size();
  if (root != kNoNode && reuse != Reuse::none) one.found = find_cached(root, tokens, n);
  if (reuse == Reuse::whole_blocks && one.found.tokens % block_tokens() != 0) {
    chain_.resize(one.found.tokens / block_tokens());
    one.found = table_->find(chain_, one.found.tokens);
  }
  bool done = one.found.tokens > 0 && try_adopt(one.handle, one.found, tx);
  if (!done && one.found.tokens % block_tokens() != 0) {  // whole blocks may need no memory
    chain_.resize(one.found.tokens / block_tokens());
    one.found = table_->find(chain_, one.found.tokens);
    done = one.found.tokens > 0 && try_adopt(one.handle, one.found, tx);
  }
  if (!done) {
    one.found = Found();
    tx.push({OpKind::open, 0, one.handle});
  }
  one.end = entered_.size();
  return one;
}

// For all tokens of the prompt.
void Cache::give_room(const Admitted& one, Transaction& tx) {
  const i64 index = sequences_.index(one.handle);
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth == Growth::token) set_length(index, g, one.tokens, tx);
  }
  grow_one(index, one.tokens - one.found.tokens, -1, tx);
}

// What is not to be taken back any more. Needs no memory.
void Cache::finish_admission(const Admitted& one, const i32* tokens, i32 root) {
  if (root == kNoNode) return;
  const i64 index = sequences_.index(one.handle), found = one.found.tokens, whole = found / block_tokens();
  Content& c = contents_[index];
  c.root = root;
  c.leaf = whole == 0 ? root : entered_[one.first + static_cast<std::size_t>(whole) - 1];
  c.known = found;
  c.retained.clear();
  std::copy(tokens + whole * block_tokens(), tokens + found, tail(index));
  lookup_tokens_ += std::max(i64{0}, one.tokens - 1);
  hit_tokens_ += found;
  const std::size_t shared = one.first + static_cast<std::size_t>(whole);
  for (std::size_t i = one.first; i < one.end; ++i) index_.hit(entered_[i]);
  // In use from now on, but in a group whose window begins later nobody refers to the first ones.
  for (std::size_t i = one.first; keeps_unheld_ && i < shared; ++i) table_->offer(entered_[i]);
  for (std::size_t i = one.end; i-- > shared;) leave_node(entered_[i]);  // what was copied is not shared
}

void Cache::unenter_from(std::size_t first) {
  while (entered_.size() > first) {
    index_.unenter(entered_.back());
    entered_.pop_back();
  }
}

// False, and nothing has changed, when there is no memory for the copy of what is cut. The nodes of the sequence follow
// in entered_.
bool Cache::try_adopt(i64 handle, const Found& found, Transaction& tx) {
  const Transaction::Point before = tx.here();
  const std::size_t first = entered_.size();
  chain_.resize(ceil_div(found.tokens, block_tokens()));
  entered_.insert(entered_.end(), chain_.begin(), chain_.end());
  for (i32 node : chain_) index_.enter(node);  // not to be given up for the room this may need
  try {
    tx.push({OpKind::open, 0, handle});
    const i64 index = sequences_.index(handle);
    for (i64 g = 0; g < groups_; ++g) {
      const GroupGeometry& group = geometry_.groups[g];
      const i64 tokens = group.growth == Growth::fixed ? 1 : found.tokens;
      set_length(index, g, tokens, tx);
      set_committed(index, g, tokens, tx);
      if (group.growth == Growth::token) {
        set_front(index, g, window_first(group, geometry_.tail_guard_tokens, tokens), tx);
      }
    }
    table_->adopt(index, chain_, found, tx);
  } catch (const OutOfMemory&) {
    tx.roll_back_to(before);
    unenter_from(first);
    return false;
  }
  return true;
}

// ---- publishing ------------------------------------------------------------------------------

// The blocks that `count` more committed tokens complete: found or made, and in use by the sequence from now on.
void Cache::collect_published(i64 index, const i32* tokens, i64 count) {
  const Content& c = contents_[index];
  const i64 size = block_tokens(), held = remainder(c.known, size);
  if (c.known != sequences_.committed(index, token_group_)) return;
  i32 last = c.leaf;
  i64 ordinal = quotient(c.known, size);
  bool is_new = false;  // then so is all that follows
  for (i64 end = size - held; end <= count; end += size) {
    const i32* block = tokens + end - size;
    if (end < size) {  // the tail says what it did, since only its first `held` tokens are known yet
      std::copy(tokens, tokens + end, tail(index) + held);
      block = tail(index);
    }
    published_.push_back({index, ordinal++, kNoNode});  // first: it may find no memory
    i32 node = is_new ? kNoNode : index_.find(last, block);
    if (node == kNoNode) node = index_.add(last, block), is_new = true;
    index_.enter(node);
    published_.back().node = node;
    last = node;
  }
}

// `*at` runs through published_, whose order is that of the sequences.
void Cache::note_published(i64 index, const i32* tokens, i64 count, std::size_t* at) {
  Content& c = contents_[index];
  if (c.known + count != sequences_.committed(index, token_group_)) return;
  const i64 held = remainder(c.known, block_tokens());
  c.known += count;
  c.state_ahead = c.state_ahead && count == 0;
  if (held + count >= block_tokens()) return note_blocks(index, tokens + count, at);
  for (i64 i = 0; i < count; ++i) tail(index)[held + i] = tokens[i];
}

// `end`: of the tokens that completed them.
void Cache::note_blocks(i64 index, const i32* end, std::size_t* at) {
  Content& c = contents_[index];
  std::copy(end - remainder(c.known, block_tokens()), end, tail(index));
  for (; *at < published_.size() && published_[*at].index == index; ++*at) {
    c.leaf = published_[*at].node;
    if (!c.retained.empty()) apply_retention(c, c.leaf);
  }
}

void Cache::unenter_published() {
  for (auto p = published_.rbegin(); p != published_.rend(); ++p) {
    if (p->node != kNoNode) index_.unenter(p->node);  // else there was no memory for it
  }
  published_.clear();
}

// ---- taking back -----------------------------------------------------------------------------

// The blocks that a sequence of `tokens` tokens does not hold any more, last one first, in leaving_.
void Cache::collect_leaving(i64 handle, i64 index, i64 tokens) {
  leaving_.clear();
  const Content& c = contents_[index];
  for (i32 node = c.leaf; node != c.root && index_.ordinal(node) >= tokens / block_tokens();
       node = index_.parent(node)) {
    leaving_.push_back(node);
  }
  if (leaving_.empty() || !index_.pinned(leaving_.back())) return;
  auto pinned = std::find_if(leaving_.begin(), leaving_.end(), [this](i32 node) { return index_.pinned(node); });
  throw SpecError("asked to truncate sequence handle " + std::to_string(handle) + " to " + std::to_string(tokens) +
                  " tokens, but its first " + std::to_string((index_.ordinal(*pinned) + 1) * block_tokens()) +
                  " are pinned: unpin() them first, or fork() the sequence at a shorter length");
}

// What no other sequence uses is forgotten, since it will be written over.
void Cache::retract_leaving(i64 index, Transaction& tx) {
  for (i32 node : leaving_) {
    table_->retract(index, node, tx);
    if (index_.users(node) > 1) continue;
    for (i32 child; (child = index_.unused_child(node)) != kNoNode;) table_->forget(child, tx);
    table_->evict(node, tx);
  }
}

void Cache::note_truncated(i64 index, i64 tokens) {
  Content& c = contents_[index];
  if (c.root == kNoNode || tokens >= c.known) return;
  c.state_ahead = true;
  const i64 rest = tokens % block_tokens();
  if (!leaving_.empty()) {
    const i32 cut = leaving_.back();
    index_.copy_tokens(cut, rest, tail(index));
    c.leaf = index_.parent(cut);
  }
  c.known = tokens;
  for (i32 node : leaving_) leave_node(node);
}

}  // namespace kvmem
