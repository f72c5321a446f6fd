// Sharing what sequences have in common: admission with the longest cached prefix, publishing what is committed, taking
// it back. The content index says what is known, the page table where it lies.

#include <algorithm>

#include "allocator/allocator.h"

namespace kvmem {

// ---- which blocks a sequence holds ---------------------------------------------------------------

void Cache::start_content(i64 index, i32 root) {
  Content& c = contents_[index];
  c.root = c.leaf = root;
  c.known = 0;
  c.marks.clear();
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
  for (i32 node = c.leaf; node != c.root;) {
    const i32 before = index_.parent(node);  // read first: the node may go
    leave_node(node);
    node = before;
  }
  if (c.root != kNoNode) index_.leave(c.root);
  c = Content();
}

// ---- finding ---------------------------------------------------------------------------------

// Fills chain_ with the known blocks that `tokens` begins with, of all but one token, and finds the memory of most of
// them: the longest start that some sequence could go on from. chain_ ends with its last block then, part of which may
// be all that is found. Cost: linear in the blocks.
Found Cache::find_cached(i32 root, const i32* tokens, i64 n, const KeyMarks& marks) {
  chain_.clear();
  if (root == kNoNode) return Found();
  const i64 size = block_tokens(), most = n - 1;
  i32 last = root;
  for (i64 done = 0; done + size <= most; done += size) {
    const i32 node = index_.find(last, tokens + done, tag_at(marks, done));
    if (node == kNoNode) break;
    chain_.push_back(last = node);
  }
  if (has_window_) look_along_windows();
  Found found;
  const std::size_t known = chain_.size();
  for (i64 blocks = static_cast<i64>(known);; --blocks, last = index_.parent(last)) {
    const i64 done = blocks * size;
    // Others that begin like the next block may have memory where its own is gone.
    const bool others = blocks == static_cast<i64>(known) || index_.has_siblings(chain_[blocks]);
    chain_.resize(blocks);
    if (others && find_part(last, tokens + done, most - done, tag_at(marks, done), &found)) return found;
    if (blocks == 0) return found;
    if (find_end(done, &found)) return found;
    if (!has_window_ && !has_state_) return found;
  }
}

// What is behind chain_ and part of one more block, which chain_ ends with then; else chain_ is as it was.
bool Cache::find_part(i32 last, const i32* tokens, i64 count, const std::string* tag, Found* found) {
  if (!prefix_.partial || has_state_ || count <= 0) return false;  // states stand at the end of whole blocks only
  const i64 done = static_cast<i64>(chain_.size()) * block_tokens();
  index_.find_partial(last, tokens, count, tag, &parts_);
  for (const PartOfBlock& part : parts_) {  // not all of them are where the tokens before them are
    chain_.push_back(part.node);
    if (find_end(done + part.tokens, found)) return true;
    chain_.pop_back();
  }
  return false;
}

// True if a sequence could go on from the first `tokens` tokens of chain_, which end in its last block.
bool Cache::find_end(i64 tokens, Found* found) {
  if (index_.whole() && index_.places(chain_.back()) == 0) return false;
  if (has_window_ && !windows_reach(tokens)) return false;
  if (has_state_ && !table_->has_state(chain_.back())) return false;
  const i64 row = table_->find_row(chain_, tokens);
  if (row < 0) return false;
  found->tokens = tokens, found->row = row;
  return true;
}

// Fills runs_ for chain_.
void Cache::look_along_windows() {
  const i64 windows = index_.windows();
  runs_.resize(chain_.size() * windows);
  for (std::size_t k = 0; k < chain_.size(); ++k) {
    for (i32 w = 0; w < windows; ++w) {
      const i32 before = k == 0 ? 0 : runs_[(k - 1) * windows + w];
      runs_[k * windows + w] = index_.has_window(chain_[k], w) ? before + 1 : 0;
    }
  }
}

// True if each window group has what it needs of the first `tokens` tokens of chain_, block by block.
bool Cache::windows_reach(i64 tokens) const {
  const i64 last = static_cast<i64>(chain_.size()) - 1;
  for (i32 w = 0; w < index_.windows(); ++w) {
    const GroupGeometry& group = geometry_.groups[index_.group_of(w)];
    const i64 first = window_first(group, geometry_.tail_guard_tokens, tokens) / block_tokens();
    if (first > last) continue;
    const i32 before = last == 0 ? 0 : runs_[(last - 1) * index_.windows() + w];
    if (!index_.has_window(chain_[last], w) || before < last - first) return false;
  }
  return true;
}

// The most whole blocks of the first `tokens` tokens of chain_ that a sequence could go on from.
Found Cache::find_whole(i64 tokens) {
  Found found;
  chain_.resize(tokens / block_tokens());
  if (has_window_) look_along_windows();
  while (!chain_.empty() && !find_end(static_cast<i64>(chain_.size()) * block_tokens(), &found)) chain_.pop_back();
  return found;
}

PrefixMatch Cache::match(const i32* tokens, i64 n, const PrefixKey& key) {
  Lock lock = enter(true);
  PrefixMatch match;
  if (!prefix_.on) return {0, off_};
  const i32 root = index_.find_root(key);
  const KeyMarks marks = placed(key.marks, tokens, n);
  match.tokens = find_cached(root, tokens, n, marks).tokens;
  match.end = why_not_more(key, marks, root, tokens, n, match.tokens);
  return match;
}

// chain_ holds what find_cached() found.
MatchEnd Cache::why_not_more(const PrefixKey& key, const KeyMarks& marks, i32 root, const i32* tokens, i64 n,
                             i64 found) const {
  const i64 size = block_tokens(), most = n - 1, blocks = found / size;
  if (found >= most) return MatchEnd::complete;
  if (most - blocks * size < size) return MatchEnd::short_block;
  const i32 last = blocks == 0 ? root : chain_[blocks - 1];
  const std::string* const tag = tag_at(marks, blocks * size);
  if (last != kNoNode &&
      index_.find(last, tokens + blocks * size, tag) != kNoNode) {  // known, but its memory does not do
    if (has_state_) return MatchEnd::no_snapshot;
    return has_window_ ? MatchEnd::window : MatchEnd::evicted;
  }
  if (index_.was_evicted(last, key, tokens + blocks * size, tag)) return MatchEnd::evicted;
  if (last != kNoNode && index_.has_other_tag(last, tokens + blocks * size)) return MatchEnd::other_salt;
  return index_.longest_elsewhere(root, tokens, most) > blocks ? MatchEnd::other_salt : MatchEnd::never_seen;
}

// ---- admission -------------------------------------------------------------------------------

i64 Cache::admit(const i32* tokens, i64 n, const PrefixKey& key, i64* cached) {
  return mutate([&] {
    sequences_.next_handle();  // refuses where there is none
    for (Reuse reuse : {Reuse::all, Reuse::whole_blocks}) {
      try {
        return admit_at(tokens, n, key, reuse, 0, false, cached);
      } catch (const OutOfMemory&) {
        // The driver had none. What is taken over less may need none of it.
      }
    }
    return admit_at(tokens, n, key, Reuse::none, 0, false, cached);
  });
}

// `grows`: with room for `count` more tokens than it found; -1: for the rest of the prompt.
i64 Cache::admit_at(const i32* tokens, i64 n, const PrefixKey& key, Reuse reuse, i64 count, bool grows, i64* cached) {
  Admitted one;
  RootUse root(index_, key, prefix_.on);
  entered_.clear();
  indices_.resize(1);
  if (prefix_.on || grows) settle();
  {
    Transaction tx(*pool_, *this);
    one = admit_one(tokens, n, key, root.node(), reuse, grows, tx);
    const i64 most = geometry_.groups[token_group_].max_tokens, room = count < 0 ? n : one.found.tokens + count;
    if (grows && room > most) refuse_room(room, most);
    if (grows) give_room(one, room, tx);
    tx.commit();
  }
  root.keep(1);
  finish_admission(one, tokens, root.node());
  count_admitted(n, one.found.tokens);
  indices_[0] = sequences_.index(one.handle);
  if (grows && geometry_.map_ahead_tokens > 0) map_ahead(1, -1);
  *cached = one.found.tokens;
  return one.handle;
}

void Cache::refuse_room(i64 tokens, i64 most) const {
  throw SpecError("asked to begin a sequence with room for " + std::to_string(tokens) + " tokens; it can hold " +
                  std::to_string(most) + " (max_tokens) at most");
}

i64 Cache::begin(const i32* tokens, i64 n, const PrefixKey& key, i64 count, i64* cached) {
  return mutate([&] {
    const i64 most = geometry_.groups[token_group_].max_tokens, asked = count < 0 ? n : count;
    if (asked > most) refuse_room(asked, most);
    return admit_at(tokens, n, key, Reuse::all, count, true, cached);
  });
}

// What was refused, or taken back, is in no statistic: a request that waits is tried in every step.
void Cache::count_admitted(i64 n, i64 cached) {
  if (!prefix_.on) return;
  lookup_tokens_ += std::max(i64{0}, n - 1);
  hit_tokens_ += cached;
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
  {
    Transaction tx(*pool_, *this);
    const i32* prompt = tokens;
    for (i64 i = 0; i < n && sequences_.count() < sequences_.capacity(); prompt += counts[i++]) {
      const Transaction::Point before = tx.here();
      try {
        admitted_.push_back(admit_one(prompt, counts[i], key, root.node(), Reuse::all, true, tx));
        give_room(admitted_.back(), counts[i], tx);
      } catch (const OutOfMemory&) {  // as many as there is memory for
        tx.roll_back_to(before);
        admitted_.resize(i);  // the one that did not fit
        break;
      }
    }
    tx.commit();
  }
  root.keep(static_cast<i64>(admitted_.size()));
  for (Admitted& one : admitted_) {
    finish_admission(one, tokens, root.node());
    indices_[&one - admitted_.data()] = sequences_.index(one.handle);
    *handles++ = static_cast<i32>(one.handle);
    *cached++ = static_cast<i32>(one.found.tokens);
    count_admitted(one.tokens, one.found.tokens);
    tokens += one.tokens;
  }
  map_ahead(static_cast<i64>(admitted_.size()), -1);
  return static_cast<i64>(admitted_.size());
}

// Short of memory it takes less of what is cached.
Cache::Admitted Cache::admit_one(const i32* tokens, i64 n, const PrefixKey& key, i32 root, Reuse reuse, bool grows,
                                 Transaction& tx) {
  Admitted one;
  one.handle = sequences_.next_handle();
  one.tokens = n;
  one.first = entered_.size();
  one.marks = placed(key.marks, tokens, n);
  if (root != kNoNode && reuse != Reuse::none) one.found = find_cached(root, tokens, n, one.marks);
  if (reuse == Reuse::whole_blocks && one.found.tokens % block_tokens() != 0) {
    one.found = find_whole(one.found.tokens);
  }
  const auto adopt = [&] {
    one.found.wanted = grows ? n : 0;
    return one.found.tokens > 0 && try_adopt(one.handle, one.found, tx);
  };
  bool done = adopt();
  if (!done && one.found.tokens % block_tokens() != 0) {  // whole blocks may need no memory
    one.found = find_whole(one.found.tokens);
    done = adopt();
  }
  if (!done) {
    one.found = Found();
    tx.push({OpKind::open, 0, one.handle});
  }
  one.end = entered_.size();
  return one;
}

// For so many tokens in all.
void Cache::give_room(const Admitted& one, i64 tokens, Transaction& tx) {
  const i64 index = sequences_.index(one.handle);
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth == Growth::token) set_length(index, g, tokens, tx);
  }
  grow_one(index, tokens - one.found.tokens, -1, tx);
}

// What is not to be taken back any more. Needs no memory.
void Cache::finish_admission(Admitted& one, const i32* tokens, i32 root) {
  if (root == kNoNode) return;
  const i64 index = sequences_.index(one.handle), found = one.found.tokens, whole = found / block_tokens();
  Content& c = contents_[index];
  c.root = root;
  c.leaf = whole == 0 ? root : entered_[one.first + static_cast<std::size_t>(whole) - 1].node;
  c.known = found;
  c.retained.clear();
  std::copy(tokens + whole * block_tokens(), tokens + found, tail(index));
  c.marks = std::move(one.marks);
  const std::size_t nodes = one.first + static_cast<std::size_t>(ceil_div(found, block_tokens()));
  const std::size_t shared = one.first + static_cast<std::size_t>(whole);
  for (std::size_t i = one.first; i < nodes; ++i) index_.hit(entered_[i].node);
  for (std::size_t i = nodes; i < one.end; ++i) index_.hit_window(entered_[i].node, entered_[i].window);
  // Of what was taken over whole, the sequence needs it now.
  for (std::size_t i = one.end; i-- > nodes;) index_.unneed(entered_[i].node, entered_[i].window, false);
  for (std::size_t i = one.first; has_state_ && i < shared; ++i) table_->offer(entered_[i].node);
  for (std::size_t i = nodes; i-- > shared;) leave_node(entered_[i].node);  // what was copied is not shared
}

// What use() enters from now on, `tx` takes back in its turn.
void Cache::begin_use(Transaction& tx) {
  tx.expect();
  tx.note({OpKind::use, 0, static_cast<i64>(entered_.size())});
}

void Cache::use(i32 node, i32 window) {
  entered_.push_back({node, window});  // first: it may find no memory
  window < 0 ? index_.enter(node) : index_.need(node, window);
}

void Cache::unuse_from(std::size_t first) {
  while (entered_.size() > first) {
    const Item x = entered_.back();
    entered_.pop_back();
    if (x.node == kNoNode) continue;  // there was no memory for it
    x.window < 0 ? index_.unenter(x.node) : index_.unneed(x.node, x.window, true);
  }
}

// False, and nothing has changed, when there is no memory for the copy of what is cut. The nodes of the sequence follow
// in entered_.
bool Cache::try_adopt(i64 handle, const Found& found, Transaction& tx) {
  const Transaction::Point before = tx.here();
  begin_use(tx);
  for (i32 node : chain_) use(node);
  for_windows(chain_, found.tokens, [this](i32 node, i32 window) { use(node, window); });
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
    return false;
  }
  return true;
}

void Cache::need_windows(const std::vector<i32>& chain, i64 tokens) {
  for_windows(chain, tokens, [this](i32 node, i32 window) { index_.need(node, window); });
}

// The last first. Needs no memory.
void Cache::unneed_windows(const std::vector<i32>& chain, i64 tokens) {
  for (i32 w = index_.windows(); w-- > 0;) {
    for (i64 k = ceil_div(tokens, block_tokens()); k-- > first_needed_block(w, tokens);) {
      index_.unneed(chain[k], w, false);
    }
  }
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
  const bool tagged = !c.marks.empty();
  for (i64 end = size - held; end <= count; end += size) {
    const i32* block = tokens + end - size;
    if (end < size) {  // the tail says what it did, since only its first `held` tokens are known yet
      std::copy(tokens, tokens + end, tail(index) + held);
      block = tail(index);
    }
    const std::string* const tag = tagged ? tag_at(c.marks, ordinal * size) : nullptr;
    entered_.push_back({kNoNode});  // first: there may be no memory for it
    i32 node = is_new ? kNoNode : index_.find(last, block, tag);
    if (node == kNoNode) node = index_.add(last, block, tag), is_new = true;
    index_.enter(node);
    entered_.back().node = last = node;
    published_.push_back({index, ordinal++, node});
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
    table_->forget(node, tx);
  }
}

void Cache::note_truncated(i64 index, i64 have, i64 tokens) {
  Content& c = contents_[index];
  if (tokens < have) c.state_ahead = true;  // whether they were committed, and by ids, or not
  if (c.root == kNoNode || tokens >= c.known) return;
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
