#include "allocator/pins.h"

#include <algorithm>

#include "allocator/contents.h"

namespace kvmem {

// Pins the chain of match_. REQUIRES: it can be used as whole blocks.
Pins::Pinned Pins::pin_match() {
  const std::vector<i32>& chain = match_.chain;
  const i64 tokens = static_cast<i64>(chain.size()) * matcher_.block_tokens();
  KVMEM_ASSERT(!chain.empty() && match_.tokens == tokens, "the chain matches as whole blocks");
  const i32 node = chain.back();
  const auto pin = ends_.emplace(made_ + 1, node).first;
  bool ends = false;
  i32 x = node;
  try {
    table_.pin_end(node, true);
    ends = true;
    for (; !index_.is_root(x); x = index_.parent(x)) index_.pin(x);
  } catch (...) {  // std::bad_alloc: the nodes after x are pinned
    if (x != node || index_.pinned(x)) index_.undo_pins(node, x);
    if (ends) table_.pin_end(node, false);
    ends_.erase(pin);
    throw;
  }
  index_.acquire(x);
  matcher_.for_windows(chain, tokens, [this](i32 y, i32 window) { index_.need(y, window); });
  return {++made_, tokens};
}

Pins::Pinned Pins::add(i64 handle, i64 tokens, i64 index, const SequenceContents& contents) {
  const i64 known = contents.known(index), size = matcher_.block_tokens();
  const i64 wanted = tokens < 0 ? known : tokens, blocks = wanted / size;
  const std::string of = " tokens of sequence handle " + std::to_string(handle);
  if (tokens > known || !matcher_.on()) {
    throw SpecError("asked to pin the first " + std::to_string(tokens) + of + "; of " + std::to_string(known) +
                    " it is known which they are: commit() token ids instead of counts, with prefix_cache=True");
  }
  if (blocks == 0) {
    throw SpecError("asked to pin " + std::to_string(wanted) + of + ": a pin holds whole blocks of " +
                    std::to_string(size) + " tokens, and there is none");
  }
  contents.copy_chain(index, &match_.chain);
  match_.chain.resize(blocks);
  if (matcher_.can_use_all(&match_)) return pin_match();
  matcher_.cut_to_blocks(blocks * size, &match_);
  throw SpecError("asked to pin the first " + std::to_string(blocks * size) + of + ", " +
                  (groups_.has_state() ? "where there is no snapshot: call snapshot() there first"
                                       : "of which some are out of window already: pin them earlier") +
                  "; the longest prefix that can be pinned now has " + std::to_string(match_.tokens) + " tokens");
}

Pins::Pinned Pins::add(i32 root, const i32* tokens, i64 n, const PrefixKey& key) {
  const i64 size = matcher_.block_tokens(), wanted = n / size * size;
  matcher_.find(root, tokens, wanted + 1, placed(key.marks, tokens, n), &match_);
  if (root == kNoNode || match_.tokens < wanted || wanted == 0) {
    throw SpecError("asked to pin " + std::to_string(wanted) + " tokens, of which the first " +
                    std::to_string(match_.tokens) + " are cached: compute and commit them, in whole blocks of " +
                    std::to_string(size) + ", then pin");
  }
  return pin_match();
}

void Pins::remove(i64 pin) {
  const auto found = ends_.find(pin);
  if (found == ends_.end()) throw StaleHandle("pin " + std::to_string(pin) + " was unpinned before");
  std::vector<i32>& chain = match_.chain;
  chain.clear();
  for (i32 node = found->second; !index_.is_root(node); node = index_.parent(node)) chain.push_back(node);
  std::reverse(chain.begin(), chain.end());
  const i32 root = index_.parent(chain.front());
  table_.pin_end(found->second, false);
  ends_.erase(found);
  unneed_windows(chain);
  for (auto x = chain.rbegin(); x != chain.rend(); ++x) {
    index_.unpin(*x);
    if (groups_.has_state() && index_.used(*x)) table_.allow_eviction(*x);
  }
  index_.drop(root);
}

// Undoes need() for each part that windows need of the chain, newest first. Needs no memory.
void Pins::unneed_windows(const std::vector<i32>& chain) {
  const i64 blocks = static_cast<i64>(chain.size()), tokens = blocks * matcher_.block_tokens();
  for (i32 w = index_.windows(); w-- > 0;) {
    for (i64 k = blocks; k-- > matcher_.first_needed_block(w, tokens);) index_.unneed(chain[k], w, false);
  }
}

std::vector<Pins::Pinned> Pins::list() const {
  std::vector<Pinned> found;
  for (const auto& [pin, node] : ends_) found.push_back({pin, (index_.ordinal(node) + 1) * matcher_.block_tokens()});
  std::sort(found.begin(), found.end(), [](const Pinned& a, const Pinned& b) { return a.pin < b.pin; });
  return found;
}

void Pins::digest(Hasher& hash) const {
  for (const auto& [pin, node] : ends_) {
    Hasher one;
    one.add(pin, node);
    hash.add_member(one);
  }
  hash.add(made_);
}

void Pins::count_users(std::vector<i32>* users) const {
  for (const auto& [pin, end] : ends_) {
    for (i32 node = end; node != kNoNode; node = index_.parent(node)) ++(*users)[node];
  }
}

}  // namespace kvmem
