// Evicts the least recently released block. The blocks of a sequence are released last block first, so a prefix
// outlives its extensions although the policy knows nothing of chains.

#include "base/id_lists.h"
#include "eviction/policy.h"

namespace kvmem {
namespace {

class LruPolicy final : public EvictionPolicy {
 public:
  void reserve(i64 ids) override { order_.reserve(ids); }
  void insert(i32, std::uint64_t, i32) override {}
  void undo_insert(i32, std::uint64_t, i32) override {}
  void hit(i32) override {}
  void use(i32 id) override { order_.remove(id); }
  void undo_use(i32 id) override {
    if (order_.undo_remove(id)) return;
    const bool last = order_.was_first_of(id) < 0 && order_.was_last_of(id) >= 0;
    last ? order_.push_back(0, id) : order_.push_front(0, id);  // its former neighbours are gone
  }
  void release(i32 id) override { order_.push_back(0, id); }
  void undo_release(i32 id) override { order_.undo_push(id); }
  i32 victim() override { return order_.empty(0) ? -1 : order_.front(0); }
  void evict(i32 id, std::uint64_t, i32) override { order_.remove(id); }
  void restore(i32 id, std::uint64_t, i32) override { undo_use(id); }

  void digest(Hasher& hash) const override { order_.digest(0, hash); }

 private:
  IdLists<> order_{1};
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru_policy() { return std::make_unique<LruPolicy>(); }

}  // namespace kvmem
