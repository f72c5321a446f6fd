#include "allocator/contents.h"

#include <algorithm>
#include <utility>

namespace kvmem {

SequenceContents::SequenceContents(const Groups& groups, const PrefixMatcher& matcher, const Sequences& sequences,
                                   PrefixIndex& index, PageTable& table)
    : used(index),
      groups_(groups),
      matcher_(matcher),
      sequences_(sequences),
      index_(index),
      table_(table),
      block_tokens_(index.block_tokens()),
      main_(groups.token_group()),
      contents_(sequences.capacity()),
      tail_tokens_(std::min(index.block_tokens(), groups.max_tokens())),
      tails_(sequences.capacity() * tail_tokens_) {}

void SequenceContents::copy_chain(i64 index, std::vector<i32>* chain) const {
  chain->clear();
  const Content& c = contents_[index];
  for (i32 node = c.leaf; node != c.root; node = index_.parent(node)) chain->push_back(node);
  std::reverse(chain->begin(), chain->end());
}

// ---- opening and freeing -------------------------------------------------------------------------

void SequenceContents::start(i64 index, i32 root) {
  Content& c = contents_[index];
  KVMEM_ASSERT(c.root == kNoNode, "the place was free");
  c.root = c.leaf = root;
  c.known = 0;
  c.marks.clear();
  c.retained.clear();
}

void SequenceContents::start_with(i64 index, i32 root, i32 leaf, i64 known, const i32* tail, KeyMarks&& marks) {
  Content& c = contents_[index];
  KVMEM_ASSERT(c.root == kNoNode, "the place was free");
  KVMEM_ASSERT(known <= sequences_.committed(index, main_), "known tokens are committed");
  c.root = root, c.leaf = leaf, c.known = known;
  c.retained.clear();
  std::copy_n(tail, remainder(known, block_tokens()), this->tail(index));
  c.marks = std::move(marks);
}

void SequenceContents::end(i64 index) {
  Content& c = contents_[index];
  PrefixIndex& nodes = index_;
  const bool has_state = groups_.has_state();
  for (i32 node = c.leaf, root = c.root; node != root;) {
    const i32 before = nodes.parent(node);  // read first, because drop() may remove the node
    has_state ? drop_node(node) : nodes.drop(node);
    node = before;
  }
  if (c.root != kNoNode) nodes.drop(c.root);
  c = Content();
}

void SequenceContents::hand_over(i64 index, Transaction& tx) {
  const Content& c = contents_[index];
  chain_.clear();
  for (i32 node = c.leaf; node != c.root; node = index_.parent(node)) {
    if (index_.users(node) > 1 && table_.is_unread(node)) chain_.push_back(node);
  }
  for (i64 other = 0; !chain_.empty() && other < sequences_.capacity(); ++other) {
    if (!sequences_.live(other) || contents_[other].root != c.root) continue;
    published_.clear();
    i32 node = contents_[other].leaf;
    for (i32 unread : chain_) {  // the last one first
      while (node != c.root && index_.ordinal(node) > index_.ordinal(unread)) node = index_.parent(node);
      if (node == unread) published_.push_back({other, index_.ordinal(node), node});
    }
    table_.publish(published_, tx);
  }
}

// ---- forking -----------------------------------------------------------------------------------

// The parent's state includes its reserved tokens, which the child does not have.
void SequenceContents::prepare_fork(i64 parent, bool reserved) {
  forked_ = contents_[parent];
  forked_.state_ahead = forked_.state_ahead || reserved;
  copy_chain(parent, &chain_);
  published_.clear();
  used.clear();
}

void SequenceContents::use_fork(Transaction& tx) {
  used.begin(tx);
  used.acquire_all(chain_);
}

void SequenceContents::publish_fork(i64 child, Transaction& tx) {
  KVMEM_ASSERT(published_.empty(), "prepare_fork() comes first");
  for (i32 node : chain_) published_.push_back({child, index_.ordinal(node), node});
  table_.publish(published_, tx);
}

void SequenceContents::finish_fork(i64 parent, i64 child) {
  KVMEM_ASSERT(contents_[child].root == kNoNode, "the place of the child was free");
  if (forked_.root != kNoNode) index_.acquire(forked_.root);
  contents_[child] = std::move(forked_);
  std::copy_n(tail(parent), tail_tokens_, tail(child));
}

// ---- publishing ----------------------------------------------------------------------------------

bool SequenceContents::completes_any(const StepPlan& plan) {
  published_.clear();
  used.clear();
  if (!plan.ids) return false;
  i64 i = 0;
  while (i < plan.n && !completes(plan.indices[i], plan.commits[i])) ++i;
  return i < plan.n;
}

void SequenceContents::publish(const StepPlan& plan, Transaction& tx) {
  const i32* ids = plan.ids;
  for (i64 i = 0; ids && i < plan.n; ids += plan.commits[i++]) {
    if (!completes(plan.indices[i], plan.commits[i])) continue;
    if (published_.empty()) used.begin(tx);
    collect(plan.indices[i], ids, plan.commits[i]);
  }
  if (!published_.empty()) table_.publish(published_, tx);
}

// Finds or adds the nodes of the blocks that `count` more committed tokens complete, and acquires them for the
// sequence.
void SequenceContents::collect(i64 index, const i32* tokens, i64 count) {
  const Content& c = contents_[index];
  const i64 size = block_tokens(), held = remainder(c.known, size);
  if (c.known != sequences_.committed(index, main_)) return;
  i32 last = c.leaf;
  i64 ordinal = quotient(c.known, size);
  bool is_new = false;  // children of a new node are new too
  const bool tagged = !c.marks.empty();
  PrefixIndex& nodes = index_;
  for (i64 end = size - held; end <= count; end += size) {
    const i32* block = tokens + end - size;
    if (end < size) {  // this does not change the tail, of which only the first `held` tokens are known
      std::copy(tokens, tokens + end, tail(index) + held);
      block = tail(index);
    }
    const std::string* const tag = tagged ? matcher_.tag_at(c.marks, ordinal * size) : nullptr;
    last = used.acquire_found([&] {
      i32 node = is_new ? kNoNode : nodes.find(last, block, tag);
      if (node == kNoNode) node = nodes.add(last, block, tag), is_new = true;
      nodes.acquire(node);
      return node;
    });
    published_.push_back({index, ordinal++, last});
  }
}

// Runs in every step for every sequence whose tokens are known, so it keeps what it uses in local variables.
void SequenceContents::note_published(const StepPlan& plan) {
  if (!plan.ids) return;
  const i64 *const indices = plan.indices.data(), size = block_tokens_, step = groups_.count(), tails = tail_tokens_;
  const i32 *ids = plan.ids, *const counts = plan.commits;
  const Sequences::Lengths* const lengths = sequences_.lengths(main_, 0);
  Content* const contents = contents_.data();
  i32* const all_tails = tails_.data();
  std::size_t at = 0;  // runs through published_, whose order is that of the sequences
  for (i64 i = 0, n = plan.n; i < n; ids += counts[i++]) {
    const i64 index = indices[i], count = counts[i];
    Content& c = contents[index];
    if (c.known + count != lengths[index * step].committed) continue;
    const i64 held = remainder(c.known, size);
    c.known += count;
    c.state_ahead = c.state_ahead && count == 0;
    if (held + count >= size) {
      note_blocks(index, ids + count, &at);
    } else {
      i32* const to = all_tails + index * tails + held;
      for (i64 k = 0; k < count; ++k) to[k] = ids[k];  // mostly one token, so no call of memcpy
    }
  }
}

void SequenceContents::note_tail(i64 index, const i32* tokens, i64 count) {
  Content& c = contents_[index];
  KVMEM_ASSERT(!completes(index, count), "no block is completed");
  if (c.known + count != sequences_.committed(index, main_)) return;
  std::copy_n(tokens, count, tail(index) + remainder(c.known, block_tokens_));
  c.known += count;
  c.state_ahead = c.state_ahead && count == 0;
}

// The sequence has published its part of published_, from `*at` on. `end`: the end of its committed token ids.
void SequenceContents::note_blocks(i64 index, const i32* end, std::size_t* at) {
  Content& c = contents_[index];
  std::copy(end - remainder(c.known, block_tokens()), end, tail(index));
  for (; *at < published_.size() && published_[*at].index == index; ++*at) {
    KVMEM_ASSERT(index_.parent(published_[*at].node) == c.leaf, "blocks are published in order");
    c.leaf = published_[*at].node;
    if (!c.retained.empty()) apply_retention(c, c.leaf);
  }
}

// ---- unpublishing --------------------------------------------------------------------------------

// Writes the blocks that a sequence of `tokens` tokens does not have any more to cut_, the last one first.
void SequenceContents::prepare_cut(i64 handle, i64 index, i64 tokens) {
  cut_.clear();
  const Content& c = contents_[index];
  for (i32 node = c.leaf; node != c.root && index_.ordinal(node) >= tokens / block_tokens();
       node = index_.parent(node)) {
    cut_.push_back(node);
  }
  if (cut_.empty() || !index_.pinned(cut_.back())) return;
  const auto pinned = std::find_if(cut_.begin(), cut_.end(), [this](i32 node) { return index_.pinned(node); });
  throw SpecError("asked to truncate sequence handle " + std::to_string(handle) + " to " + std::to_string(tokens) +
                  " tokens, but its first " + std::to_string((index_.ordinal(*pinned) + 1) * block_tokens()) +
                  " are pinned: unpin() them first, or fork() the sequence at a shorter length");
}

// Evicts the blocks that no other sequence uses, because this one will overwrite them.
void SequenceContents::unpublish(i64 index, Transaction& tx) {
  const PageTable::Discarding wrong(table_);
  for (i32 node : cut_) {
    table_.unpublish(index, node, tx);
    if (index_.users(node) > 1) continue;
    table_.evict_subtree(node, tx);
  }
}

void SequenceContents::note_cut(i64 index, i64 have, i64 tokens) {
  Content& c = contents_[index];
  if (tokens < have) c.state_ahead = true;  // even if the tokens were not committed
  if (c.root == kNoNode || tokens >= c.known) return;
  if (!cut_.empty()) {
    const i32 cut = cut_.back();
    index_.copy_tokens(cut, tokens % block_tokens(), tail(index));
    c.leaf = index_.parent(cut);
  }
  c.known = tokens;
  for (i32 node : cut_) drop_node(node);
  KVMEM_ASSERT(index_.is_root(c.leaf) || index_.ordinal(c.leaf) < tokens / block_tokens(),
               "only what is left is known");
}

// ---- retention -----------------------------------------------------------------------------------

namespace {

// Adds a range; it replaces the parts of earlier ranges that it covers.
void put_retention(const Retention& added, std::vector<Retention>* retained) {
  std::vector<Retention> left;
  left.reserve(retained->size() + 2);
  const auto add_part = [&left](Retention part, i64 first, i64 end) {
    part.first = first, part.end = end;
    if (first < end) left.push_back(part);
  };
  for (const Retention& r : *retained) add_part(r, r.first, std::min(r.end, added.first));
  left.push_back(added);
  for (const Retention& r : *retained) add_part(r, std::max(r.first, added.end), r.end);
  retained->swap(left);
}

}  // namespace

void SequenceContents::retain(i64 index, const Retention& added) {
  KVMEM_ASSERT(0 <= added.first && added.first < added.end, "the range is not empty");
  Content& c = contents_[index];
  index_.expect_retention();
  chain_.clear();
  i32 node = c.leaf;
  for (; node != c.root && index_.ordinal(node) >= added.end; node = index_.parent(node)) {
  }
  for (; node != c.root && index_.ordinal(node) >= added.first; node = index_.parent(node)) chain_.push_back(node);
  put_retention(added, &c.retained);  // what follows cannot fail
  for (auto at = chain_.rbegin(); at != chain_.rend(); ++at) index_.retain(*at, added.priority, added.seconds);
}

void SequenceContents::apply_retention(const Content& content, i32 node) {
  const i64 ordinal = index_.ordinal(node);
  const auto found = std::partition_point(content.retained.begin(), content.retained.end(),
                                          [ordinal](const Retention& r) { return r.end <= ordinal; });
  if (found == content.retained.end() || ordinal < found->first) return;
  index_.retain(node, found->priority, found->seconds);
}

// ---- checks --------------------------------------------------------------------------------------

void SequenceContents::digest(Hasher& hash) const {
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    const Content& c = contents_[index];
    hash.add(c.root, c.leaf, c.known, c.state_ahead, c.retained.size());
    for (i64 i = 0; c.root != kNoNode && i < remainder(c.known, block_tokens()); ++i) {
      hash.add(tails_[index * tail_tokens_ + i]);
    }
  }
}

void SequenceContents::count_users(std::vector<i32>* users) const {
  for (const Content& c : contents_) {
    for (i32 node = c.root == kNoNode ? kNoNode : c.leaf; node != kNoNode; node = index_.parent(node)) ++(*users)[node];
  }
}

void SequenceContents::check(std::vector<std::string>* out) const {
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    const Content& c = contents_[index];
    if (c.root == kNoNode) continue;
    const i64 tokens = index_.is_root(c.leaf) ? 0 : (index_.ordinal(c.leaf) + 1) * block_tokens();
    if (tokens == c.known - c.known % block_tokens() && c.known <= sequences_.committed(index, main_)) {
      continue;
    }
    out->push_back("sequence handle " + std::to_string(sequences_.handle_of(index)) +
                   ": its known tokens do not match its chain or its committed tokens");
  }
}

}  // namespace kvmem
