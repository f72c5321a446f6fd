#include "allocator/tiers.h"

#include <memory>
#include <utility>

namespace kvmem {

void Tiers::open(const std::vector<i64>& counts, const std::string& policy) {
  if (table_.slots()) throw SpecError("host slots: this allocator has some already");
  if (!matcher_.on()) throw SpecError("host slots: nothing is shared, so nothing is cached that they could keep");
  std::vector<i64> bytes;
  for (i64 g = 0; g < groups_.count(); ++g) bytes.push_back(table_.slot_bytes(g));
  table_.use_slots(std::make_shared<HostSlots>(std::move(bytes), counts, policy));
}

HostSlots& Tiers::slots() const {
  if (!table_.slots()) throw SpecError("host slots: this allocator has none");
  return *table_.slots();
}

std::vector<std::uint8_t> Tiers::residency(const i32* tokens, i64 n, const PrefixKey& key) const {
  const i64 groups = groups_.count();
  std::vector<std::uint8_t> found(n / matcher_.block_tokens() * groups, 0);
  for_chain(tokens, n, key, [&](i64 k, i32 node) {
    for (i64 g = 0; g < groups; ++g) found[k * groups + g] = table_.has(node, g);
  });
  return found;
}

void Tiers::store(const i32* tokens, i64 n, const PrefixKey& key, const std::vector<bool>& wanted, Transaction& tx) {
  const i64 groups = groups_.count();
  if (static_cast<i64>(wanted.size()) != n / matcher_.block_tokens() * groups) {
    throw SpecError("store: an answer is needed for each block and group");
  }
  slots();  // throws if there are none
  for_chain(tokens, n, key, [&](i64 k, i32 node) {
    for (i64 g = 0; g < groups; ++g) {
      if (wanted[k * groups + g]) table_.keep(node, g, tx);
    }
  });
}

void Tiers::promote(const i32* tokens, i64 n, const PrefixKey& key, i32 root, const std::vector<i64>& slots,
                    Transaction& tx) {
  const i64 size = matcher_.block_tokens(), blocks = n / size;
  if (static_cast<i64>(slots.size()) != blocks * groups_.count()) {
    throw SpecError("promote: a slot, or -1, is needed for each block and group");
  }
  const KeyMarks marks = placed(key.marks, tokens, n);
  UsedNodes& used = contents_.used;
  used.begin(tx);
  std::vector<i32> chain;
  i32 last = root;
  for (i64 k = 0; k < blocks; ++k) {
    const i32* const block = tokens + k * size;
    const std::string* const tag = matcher_.tag_at(marks, k * size);
    last = used.acquire_found([&] {
      i32 node = index_.find(last, block, tag);
      if (node == kNoNode) {
        node = index_.add(last, block, tag);
        if (!index_.whole()) index_.note_path(node);
      }
      index_.acquire(node);
      return node;
    });
    chain.push_back(last);
  }
  check_promote(chain, slots);
  matcher_.for_windows(chain, n / size * size, [&](i32 node, i32 window) { used.acquire(node, window); });
  table_.promote(chain, {slots.data(), groups_.count()}, tx);
}

void Tiers::check_promote(const std::vector<i32>& chain, const std::vector<i64>& slots) const {
  for (std::size_t at = 0; at < slots.size(); ++at) {
    const i64 g = static_cast<i64>(at) % groups_.count(), k = static_cast<i64>(at) / groups_.count();
    const bool full = groups_[g].growth == Growth::token && groups_[g].window_tokens == 0;
    if (slots[at] >= 0) {
      const HostSlots& host = this->slots();
      if (slots[at] < host.first(g) || slots[at] >= host.first(g) + host.count(g)) {
        throw SpecError("promote: slot " + std::to_string(slots[at]) + " is not of group " + std::to_string(g));
      }
    } else if (full && !table_.has(chain[k], g)) {
      throw SpecError("promote: neither the device nor a slot has block " + std::to_string(k) + " of group " +
                      std::to_string(g));
    }
  }
}

// The last block is left first, so that a prefix outlives its extensions.
void Tiers::finish_promote() {
  UsedNodes& used = contents_.used;
  for (std::size_t i = used.size(); i-- > 0;) {
    const Item x = used[i];
    x.window < 0 ? contents_.drop_node(x.node) : index_.unneed(x.node, x.window, false);
  }
  used.clear();
}

}  // namespace kvmem
