#include "allocator/match.h"

namespace kvmem {

void PrefixMatcher::find(i32 root, const i32* tokens, i64 n, const KeyMarks& marks, Match* match) {
  std::vector<i32>& chain = match->chain;
  chain.clear();
  match->tokens = 0, match->cookie = -1;
  if (root == kNoNode) return;
  const i64 size = block_tokens(), most = n - 1;
  i32 last = root;
  const PrefixIndex& index = index_;
  for (i64 done = 0; done + size <= most; done += size) {
    const i32 node = index.find(last, tokens + done, tag_at(marks, done));
    if (node == kNoNode) break;
    chain.push_back(last = node);
  }
  // Nodes in use may have no memory.
  while (index.whole() && !chain.empty() && index.copies(chain.back()) == 0) chain.pop_back();
  if (!chain.empty()) last = chain.back();
  if (groups_.has_window()) count_runs(chain);
  const std::size_t known = chain.size();
  for (i64 blocks = static_cast<i64>(known);; --blocks, last = index_.parent(last)) {
    const i64 done = blocks * size;
    // If the next block has no memory any more, a sibling that begins with the same tokens may have.
    const bool others = blocks == static_cast<i64>(known) || index_.has_siblings(chain[blocks]);
    chain.resize(blocks);
    if (others && find_part(last, tokens + done, most - done, tag_at(marks, done), match)) return;
    if (blocks == 0 || try_end(done, match)) return;
    if (!groups_.has_window() && !groups_.has_state()) return;
  }
}

// Returns whether a sequence can continue from the chain and part of one more block; appends that block to the chain if
// so, and leaves the chain as it was if not.
bool PrefixMatcher::find_part(i32 last, const i32* tokens, i64 count, const std::string* tag, Match* match) {
  // Snapshots exist at the end of whole blocks only.
  if (!options_.partial || groups_.has_state() || count <= 0) return false;
  const i64 done = static_cast<i64>(match->chain.size()) * block_tokens();
  index_.find_partial(last, tokens, count, tag, &parts_);
  for (const PartOfBlock& part : parts_) {
    match->chain.push_back(part.node);
    if (try_end(done + part.tokens, match)) return true;
    match->chain.pop_back();
  }
  return false;
}

// Returns whether a sequence can continue from the first `tokens` tokens of the chain; sets `tokens` and `row` if so.
// REQUIRES: they end in the chain's last block.
bool PrefixMatcher::try_end(i64 tokens, Match* match) const {
  const std::vector<i32>& chain = match->chain;
  KVMEM_ASSERT(ceil_div(tokens, block_tokens()) == static_cast<i64>(chain.size()), "they end in the last block");
  if (index_.whole() && index_.copies(chain.back()) == 0) return false;
  if (groups_.has_window() && !windows_reach(chain, tokens)) return false;
  if (groups_.has_state() && !table_.has_snapshot(chain.back())) return false;
  const i64 cookie = table_.find_memory(chain, tokens);
  if (cookie < 0) return false;
  match->tokens = tokens, match->cookie = cookie;
  return true;
}

void PrefixMatcher::count_runs(const std::vector<i32>& chain) {
  const i64 windows = index_.windows();
  runs_.resize(chain.size() * windows);
  for (std::size_t k = 0; k < chain.size(); ++k) {
    for (i32 w = 0; w < windows; ++w) {
      const i32 before = k == 0 ? 0 : runs_[(k - 1) * windows + w];
      runs_[k * windows + w] = index_.has_window(chain[k], w) ? before + 1 : 0;
    }
  }
}

// Returns whether each window group has all blocks that it needs of the first `tokens` tokens.
bool PrefixMatcher::windows_reach(const std::vector<i32>& chain, i64 tokens) const {
  const i64 last = static_cast<i64>(chain.size()) - 1;
  for (i32 w = 0; w < index_.windows(); ++w) {
    const i64 first = first_needed_block(w, tokens);
    if (first > last) continue;
    const i32 before = last == 0 ? 0 : runs_[(last - 1) * index_.windows() + w];
    if (!index_.has_window(chain[last], w) || before < last - first) return false;
  }
  return true;
}

bool PrefixMatcher::can_use_all(Match* match) {
  if (groups_.has_window()) count_runs(match->chain);
  return try_end(static_cast<i64>(match->chain.size()) * block_tokens(), match);
}

void PrefixMatcher::cut_to_blocks(i64 tokens, Match* match) {
  std::vector<i32>& chain = match->chain;
  match->tokens = 0, match->cookie = -1;
  chain.resize(tokens / block_tokens());
  if (groups_.has_window()) count_runs(chain);
  while (!chain.empty() && !try_end(static_cast<i64>(chain.size()) * block_tokens(), match)) chain.pop_back();
}

Match PrefixMatcher::match(const i32* tokens, i64 n, const PrefixKey& key) {
  Match match;
  match.end = off_;
  if (!options_.on) return match;
  const i32 root = index_.find_root(key);
  const KeyMarks marks = placed(key.marks, tokens, n);
  find(root, tokens, n, marks, &match);
  match.end = reason(key, marks, root, tokens, n, match);
  return match;
}

MatchEnd PrefixMatcher::reason(const PrefixKey& key, const KeyMarks& marks, i32 root, const i32* tokens, i64 n,
                               const Match& match) const {
  const i64 size = block_tokens(), most = n - 1, blocks = match.tokens / size;
  if (match.tokens >= most) return MatchEnd::complete;
  if (most - blocks * size < size) return MatchEnd::short_block;
  const i32 last = blocks == 0 ? root : match.chain[blocks - 1];
  const i32* const next = tokens + blocks * size;
  const std::string* const tag = tag_at(marks, blocks * size);
  if (last != kNoNode && index_.find(last, next, tag) != kNoNode) {  // the index has the block, but it cannot be used
    if (groups_.has_state()) return MatchEnd::no_snapshot;
    return groups_.has_window() ? MatchEnd::window : MatchEnd::evicted;
  }
  if (index_.was_evicted(last, key, next, tag)) return MatchEnd::evicted;
  if (last != kNoNode && index_.has_other_tag(last, next)) return MatchEnd::other_salt;
  return index_.longest_elsewhere(root, tokens, most) > blocks ? MatchEnd::other_salt : MatchEnd::never_seen;
}

}  // namespace kvmem
