#include "soak_router.h"

#include <algorithm>
#include <functional>

namespace kvmem_soak {

using namespace kvmem;

u64 Router::root_chain(const PrefixKey& key) {
  return mix(std::hash<std::string>()(key.salt), std::hash<std::string>()(key.extra_key));
}

u64 Router::chain_after(u64 before, const i32* tokens, i64 count) {
  for (i64 i = 0; i < count; ++i) before = writer_after(before, tokens[i]);
  return mix(before);
}

void Router::follow(const EventRecords& records, const std::unordered_map<i32, PrefixKey>& roots) {
  const i32* tokens = records.tokens.data();
  for (i64 i = 0; i < records.size(); ++i) {
    const auto kind = static_cast<EventKind>(records.kinds[i]);
    if (kind == EventKind::cleared) {
      held_.clear();
    } else if (kind == EventKind::stored) {
      store(records, i, tokens, roots);
      tokens += records.block_tokens;
    } else {
      const auto chain = chains_.find(records.nodes[i]);
      const u64 bit = u64{1} << records.groups[i];
      if (chain == chains_.end() || !(held_[chain->second] & bit)) {
        throw Failure("an event removes a block that was not stored");
      }
      held_[chain->second] &= ~bit;
    }
  }
}

void Router::store(const EventRecords& records, i64 i, const i32* tokens,
                   const std::unordered_map<i32, PrefixKey>& roots) {
  u64 before = 0;
  if (records.parents[i] >= 0) {
    const auto parent = chains_.find(records.parents[i]);
    if (parent == chains_.end()) throw Failure("an event names a parent that was never stored");
    before = parent->second;
  } else {
    const auto root = roots.find(records.roots[i]);
    if (root == roots.end()) throw Failure("an event names a root whose key is not told");
    before = root_chain(root->second);
  }
  const u64 chain = chain_after(before, tokens, records.block_tokens);
  chains_[records.nodes[i]] = chain;
  if (records.groups[i] < 0) return;
  const u64 bit = u64{1} << records.groups[i];
  if (held_[chain] & bit) throw Failure("an event stores a block that is stored already");
  held_[chain] |= bit;
}

bool Router::needs_nothing(i64 tokens) const {
  return std::all_of(geometry_.groups.begin(), geometry_.groups.end(), [&](const GroupGeometry& group) {
    return group.growth != Growth::fixed && window_first(group, geometry_.tail_guard_tokens, tokens) == tokens;
  });
}

i64 Router::predict(const std::vector<i32>& ids, const PrefixKey& key, i64 block_tokens) const {
  i64 best = 0;
  std::vector<i64> run(geometry_.groups.size(), 0);  // blocks on end that a group holds, up to the one looked at
  u64 chain = root_chain(key);
  for (i64 end = block_tokens; end <= static_cast<i64>(ids.size()); end += block_tokens) {
    chain = chain_after(chain, ids.data() + end - block_tokens, block_tokens);
    const auto found = held_.find(chain);
    bool all = true;
    for (std::size_t g = 0; g < run.size(); ++g) {
      const GroupGeometry& group = geometry_.groups[g];
      const bool here = found != held_.end() && (found->second >> g & 1);
      run[g] = here ? run[g] + 1 : 0;
      const i64 needed = group.growth == Growth::fixed
                             ? 1
                             : (end - window_first(group, geometry_.tail_guard_tokens, end)) / block_tokens;
      all = all && run[g] >= needed;
    }
    if (all) best = end;
  }
  return best;
}

}  // namespace kvmem_soak
