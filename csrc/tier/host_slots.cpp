#include "tier/host_slots.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace kvmem {
namespace {

constexpr i64 kHugePage = 2 << 20;

}  // namespace

HostMemory::HostMemory(i64 bytes) : bytes_(round_up(bytes, kHugePage)) {
  void* const at = mmap(nullptr, static_cast<std::size_t>(bytes_), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) {
    throw OutOfMemory("host memory: there are no addresses for " + std::to_string(bytes_) + " bytes; ask for less");
  }
  data_ = static_cast<char*>(at);
  madvise(at, static_cast<std::size_t>(bytes_), MADV_HUGEPAGE);  // a hint
}

HostMemory::~HostMemory() { munmap(data_, static_cast<std::size_t>(bytes_)); }

HostSlots::HostSlots(std::vector<i64> slot_bytes, const std::vector<i64>& counts, const std::string& policy)
    : slot_bytes_(std::move(slot_bytes)) {
  if (counts.size() != slot_bytes_.size()) throw SpecError("host slots: a count is needed for each group");
  for (std::size_t g = 0; g < counts.size(); ++g) {
    if (counts[g] < 0 || slot_bytes_[g] < 0 || counts[g] > INT32_MAX - first_.back()) {
      throw SpecError("host slots: got " + std::to_string(counts[g]) + " slots of " + std::to_string(slot_bytes_[g]) +
                      " bytes; must be 0 or more, and at most 2147483647 in all");
    }
    first_.push_back(first_.back() + counts[g]);
    start_.push_back(start_.back() + counts[g] * slot_bytes_[g]);
    policies_.push_back(make_eviction_policy(policy));
    policies_.back()->reserve(counts[g]);
    std::vector<i64>& free = free_.emplace_back();
    for (i64 slot = first_.back(); slot-- > first_[g];) free.push_back(slot);
  }
  slots_.resize(first_.back());
  memory_ = std::make_shared<HostMemory>(std::max(start_.back(), i64{1}));
}

i64 HostSlots::group_of(i64 slot) const {
  KVMEM_ASSERT(slot >= 0 && slot < first_.back(), "the slot exists");
  i64 group = 0;
  while (slot >= first_[group + 1]) ++group;
  return group;
}

SlotName HostSlots::take(i64 group, std::uint64_t key) {
  i64 at = -1;
  if (!free_[group].empty()) {
    at = free_[group].back();
    free_[group].pop_back();
  } else {
    const i32 victim = policies_[group]->victim();
    if (victim < 0) return {};
    at = first_[group] + victim;
    policies_[group]->evict(victim, slots_[at].key, -1);
  }
  Slot& s = slots_[at];
  KVMEM_ASSERT(s.holds == 0, "a held slot is not given away");
  s.taken = true, s.dropped = false, s.key = key;
  ++s.generation;
  policies_[group]->insert(item(at), key, -1);
  policies_[group]->release(item(at));
  return {at, s.generation};
}

void HostSlots::free(i64 slot) {
  Slot& s = slots_[slot];
  KVMEM_ASSERT(s.taken && s.holds == 0, "the slot has content, and nothing uses it");
  const i64 group = group_of(slot);
  policies_[group]->evict(item(slot), s.key, -1);
  s.taken = s.dropped = false;
  free_[group].push_back(slot);
}

bool HostSlots::hold(const SlotName& name) {
  if (!has(name) || slots_[name.slot].dropped) return false;
  if (slots_[name.slot].holds++ == 0) policies_[group_of(name.slot)]->use(item(name.slot));
  return true;
}

void HostSlots::release(const SlotName& name) {
  KVMEM_ASSERT(has(name) && slots_[name.slot].holds > 0, "the slot is held");
  if (--slots_[name.slot].holds > 0) return;
  policies_[group_of(name.slot)]->release(item(name.slot));
  if (slots_[name.slot].dropped) free(name.slot);
}

void HostSlots::hit(const SlotName& name) {
  if (has(name)) policies_[group_of(name.slot)]->hit(item(name.slot));
}

void HostSlots::drop(const SlotName& name) {
  if (!has(name)) return;
  if (slots_[name.slot].holds > 0) {
    slots_[name.slot].dropped = true;
  } else {
    free(name.slot);
  }
}

void HostSlots::check(std::vector<std::string>* out) const {
  for (i64 g = 0; g < groups(); ++g) {
    i64 taken = 0;
    for (i64 slot = first_[g]; slot < first_[g + 1]; ++slot) taken += slots_[slot].taken;
    if (taken + free_count(g) == count(g)) continue;
    out->push_back("of the " + std::to_string(count(g)) + " host slots of group " + std::to_string(g) + ", " +
                   std::to_string(taken) + " are taken and " + std::to_string(free_count(g)) + " free");
  }
}

}  // namespace kvmem
