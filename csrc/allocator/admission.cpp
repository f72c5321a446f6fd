#include "allocator/admission.h"

#include <algorithm>
#include <string>
#include <utility>

namespace kvmem {

void Admission::check_length(i64 tokens) const {
  const i64 most = groups_.max_tokens();
  if (tokens <= most) return;
  throw SpecError("asked to begin a sequence with room for " + std::to_string(tokens) + " tokens; it can hold " +
                  std::to_string(most) + " (max_tokens) at most");
}

void Admission::check_prompts(const i32* counts, i64 n) const {
  const i64 most = groups_.max_tokens();
  for (i64 i = 0; i < n; ++i) {
    if (counts[i] >= 0 && counts[i] <= most) continue;
    std::string message = "prompt " + std::to_string(i) + " has " + std::to_string(counts[i]) + " tokens";
    if (counts[i] > most) message += "; a sequence can hold " + std::to_string(most) + " (max_tokens)";
    throw SpecError(message);
  }
}

void Admission::start(i64 n) {
  KVMEM_ASSERT(n >= 0, "a call opens a number of sequences");
  contents_.used.clear();
  admitted_.clear();
  admitted_.reserve(n);
}

void Admission::open(const i32* tokens, i64 n, const PrefixKey& key, i32 root, Reuse reuse, bool grows, Transaction& tx,
                     i64 pending) {
  Admitted& one = admitted_.emplace_back();
  one.handle = pending != 0 ? pending : sequences_.next_handle();
  one.tokens = n;
  one.first = contents_.used.size();
  one.marks = placed(key.marks, tokens, n);
  match_.tokens = 0;
  if (root != kNoNode && reuse != Reuse::none) matcher_.find(root, tokens, n, one.marks, &match_);
  const auto is_cut = [&] { return match_.tokens % matcher_.block_tokens() != 0; };
  if (reuse == Reuse::whole_blocks && is_cut()) matcher_.cut_to_blocks(match_.tokens, &match_);
  bool done = try_adopt(one, pending == 0, grows, tx);
  if (!done && is_cut()) {  // whole blocks need no copy, so they may need no memory
    matcher_.cut_to_blocks(match_.tokens, &match_);
    done = try_adopt(one, pending == 0, grows, tx);
  }
  if (!done && pending == 0) tx.push({OpKind::open, 0, one.handle});
  one.cached = done ? match_.tokens : 0;
  one.end = contents_.used.size();
  KVMEM_ASSERT(sequences_.is_live(one.handle), "the sequence is open");
  KVMEM_ASSERT(one.cached < std::max(n, i64{1}), "at least one token of the prompt is left to compute");
}

// Opens the sequence with match_, and adds the nodes that it uses to `used`. Returns false, and has changed nothing, if
// nothing matched or there is no memory to copy a block that matches in part.
bool Admission::try_adopt(const Admitted& one, bool opens, bool grows, Transaction& tx) {
  if (match_.tokens == 0) return false;
  const Transaction::Point before = tx.here();
  UsedNodes& used = contents_.used;
  used.begin(tx);
  used.acquire_all(match_.chain);
  matcher_.for_windows(match_.chain, match_.tokens, [&used](i32 node, i32 window) { used.acquire(node, window); });
  try {
    if (opens) tx.push({OpKind::open, 0, one.handle});
    const i64 index = sequences_.index(one.handle);
    for (i64 g = 0; g < groups_.count(); ++g) {
      const i64 tokens = groups_[g].growth == Growth::fixed ? 1 : match_.tokens;
      records_.set_tokens(index, g, tokens, tx);
      records_.set_committed(index, g, tokens, tx);
      if (groups_[g].growth == Growth::token) records_.set_front(index, g, groups_.first_needed(g, tokens), tx);
    }
    table_.adopt(index, match_.chain, {match_.tokens, match_.cookie, grows ? one.tokens : 0}, tx);
  } catch (const OutOfMemory&) {
    tx.roll_back_to(before);
    return false;
  }
  return true;
}

void Admission::make_room(i64 count, Transaction& tx) {
  KVMEM_ASSERT(!admitted_.empty(), "open() comes first");
  const Admitted& one = admitted_.back();
  const i64 tokens = count < 0 ? one.tokens : one.cached + count;
  check_length(tokens);
  growth_.grow_to(sequences_.index(one.handle), tokens, one.cached, tx);
}

void Admission::open_first(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32 root,
                           Transaction& tx) {
  for (i64 i = 0; i < n && sequences_.count() < sequences_.capacity(); tokens += counts[i++]) {
    const Transaction::Point before = tx.here();
    try {
      open(tokens, counts[i], key, root, Reuse::all, true, tx);
      make_room(-1, tx);
    } catch (const OutOfMemory&) {
      tx.roll_back_to(before);
      admitted_.resize(i);
      return;
    }
  }
}

// Only successful admissions are counted, because a scheduler tries a waiting request in every step.
void Admission::finish(const i32* tokens, i32 root) {
  if (root == kNoNode) return;
  for (Admitted& one : admitted_) {
    finish_one(one, tokens, root);
    lookup_tokens_ += std::max(i64{0}, one.tokens - 1);
    hit_tokens_ += one.cached;
    tokens += one.tokens;
  }
}

void Admission::finish_one(Admitted& one, const i32* tokens, i32 root) {
  KVMEM_ASSERT(one.first <= one.end && one.end <= contents_.used.size(), "its uses are a part of the call's");
  const UsedNodes& used = contents_.used;
  const i64 size = matcher_.block_tokens(), whole = one.cached / size;
  const std::size_t shared = one.first + static_cast<std::size_t>(whole);
  const std::size_t nodes = one.first + static_cast<std::size_t>(ceil_div(one.cached, size));
  contents_.start_with(sequences_.index(one.handle), root, whole == 0 ? root : used[shared - 1].node, one.cached,
                       tokens + whole * size, std::move(one.marks));
  PrefixIndex& index = index_;
  for (std::size_t i = one.first; i < nodes; ++i) index.hit(used[i].node);
  for (std::size_t i = nodes; i < one.end; ++i) index_.hit_window(used[i].node, used[i].window);
  // The sequence itself needs the reused parts from now on.
  for (std::size_t i = one.end; i-- > nodes;) index_.unneed(used[i].node, used[i].window, false);
  for (std::size_t i = one.first; groups_.has_state() && i < shared; ++i) table_.allow_eviction(used[i].node);
  for (std::size_t i = nodes; i-- > shared;) contents_.drop_node(used[i].node);  // a copied block is not shared
}

}  // namespace kvmem
