#include "allocator/tiers.h"

#include <memory>
#include <utility>

#include "allocator/update.h"

namespace kvmem {
namespace {

// While it exists, the pending sequence can be used; afterwards it is pending again, unless the call was done.
class PendingUse {
 public:
  PendingUse(Sequences& sequences, i64 handle) : sequences_(sequences), handle_(handle) {
    if (!sequences.is_pending(handle)) {
      throw StaleHandle("sequence handle " + std::to_string(handle) + " is not pending: it was freed meanwhile");
    }
    sequences.set_pending(handle, false);
  }
  ~PendingUse() {
    if (handle_ != 0) sequences_.set_pending(handle_, true);
  }
  PendingUse(const PendingUse&) = delete;
  PendingUse& operator=(const PendingUse&) = delete;
  i64 done(i64 result) const {
    handle_ = 0;
    return result;
  }

 private:
  Sequences& sequences_;
  mutable i64 handle_;
};

}  // namespace

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

std::vector<i32> Tiers::promote(const i32* tokens, i64 n, const PrefixKey& key, i32 root, const std::vector<i64>& slots,
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
  return chain;
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
void Tiers::finish_promote(const std::vector<i32>& chain, const std::vector<i64>& slots) {
  for (std::size_t at = 0; at < slots.size(); ++at) {
    if (slots[at] < 0) continue;
    const i64 g = static_cast<i64>(at) % groups_.count();
    const i32 node = chain[at / static_cast<std::size_t>(groups_.count())];
    this->slots().hit(slots[at]);
    const Priority priority = this->slots().priority(slots[at]);
    if (priority.is_set() && table_.has(node, g)) index_.retain({node, index_.window_of(g)}, priority);
  }
  UsedNodes& used = contents_.used;
  for (std::size_t i = used.size(); i-- > 0;) {
    const Item x = used[i];
    x.window < 0 ? contents_.drop_node(x.node) : index_.unneed(x.node, x.window, false);
  }
  used.clear();
}

LockedTiers::LockedTiers(Allocator& allocator)
    : lock_((allocator.fork_guard_.check("the allocator"), allocator.pool_->lock())), tiers_(allocator.tiers_) {}

void LockedTiers::promote(Allocator& a, const i32* tokens, i64 n, const PrefixKey& key, const std::vector<i64>& slots) {
  a.update([&] {
    RootUse root(a.index_, key, true);
    a.contents_.used.clear();
    a.pool_->settle();
    a.tiers_.expect_priorities(slots);
    std::vector<i32> chain;
    {
      Transaction tx(*a.pool_, a);
      chain = a.tiers_.promote(tokens, n, key, root.node(), slots, tx);
      tx.commit();
    }
    root.commit(1);
    a.tiers_.finish_promote(chain, slots);
    a.index_.drop(root.node());
  });
}

void LockedTiers::store(Allocator& a, const i32* tokens, i64 n, const PrefixKey& key, const std::vector<bool>& wanted) {
  a.update([&] {
    a.pool_->settle();
    Transaction tx(*a.pool_, a);
    a.tiers_.store(tokens, n, key, wanted, tx);
    tx.commit();
  });
}

i64 LockedTiers::admit(Allocator& a, i64 handle, const i32* tokens, i64 n, const PrefixKey& key) {
  return a.update([&] {
    const PendingUse pending(a.sequences_, handle);
    i64 cached = 0;
    for (Reuse reuse : {Reuse::all, Reuse::whole_blocks, Reuse::none}) {
      RootUse root(a.index_, key, a.prefix_.on);
      a.admission_.start(1);
      a.pool_->settle();
      try {
        Transaction tx(*a.pool_, a);
        a.admission_.open(tokens, n, key, root.node(), reuse, false, tx, handle);
        tx.commit();
      } catch (const OutOfMemory&) {
        if (reuse == Reuse::none) throw;
        continue;
      }
      a.contents_.end(a.sequences_.index(handle));  // it was opened empty
      root.commit(1);
      a.admission_.finish(tokens, root.node());
      cached = a.admission_.admitted().front().cached;
      break;
    }
    return pending.done(cached);
  });
}

}  // namespace kvmem
