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

// Each content is one of a slot, or followed by one of a slot.
HostSlots::Order::Order(i64 count, const std::string& name)
    : ids(2 * count), slots(static_cast<std::size_t>(2 * count), -1), policy(make_eviction_policy(name)) {
  policy.reserve(2 * count);
}

HostSlots::HostSlots(std::vector<i64> slot_bytes, const std::vector<i64>& counts, const std::string& policy)
    : slot_bytes_(std::move(slot_bytes)) {
  if (counts.size() != slot_bytes_.size()) throw SpecError("host slots: a count is needed for each group");
  for (std::size_t g = 0; g < counts.size(); ++g) {
    if (counts[g] < 0 || slot_bytes_[g] < 0 || counts[g] > INT32_MAX / 2 - first_.back()) {
      throw SpecError("host slots: got " + std::to_string(counts[g]) + " slots of " + std::to_string(slot_bytes_[g]) +
                      " bytes; must be 0 or more, and at most 1073741823 in all");
    }
    first_.push_back(first_.back() + counts[g]);
    start_.push_back(start_.back() + counts[g] * slot_bytes_[g]);
    orders_.push_back(std::make_unique<Order>(counts[g], policy));
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

SlotName HostSlots::take(i64 group, const SlotContent& content) {
  Order& order = *orders_[group];
  const i32 id = order.ids.find(content.key);
  const i64 same = id < 0 ? -1 : order.slots[id];
  const bool again = same >= 0 && slots_[same].holds == 0, any = !again && !free_[group].empty();
  const i32 victim = again ? id : any ? -1 : order.policy.victim();
  if (!any && victim < 0) return {};
  const i64 at = any ? free_[group].back() : order.slots[victim];
  Slot& s = slots_[at];
  KVMEM_ASSERT(s.holds == 0 && s.taken != any, "a held slot is not given away");
  takes_.push_back({at, s.content, s.taken});
  any ? free_[group].pop_back() : leave(at);
  enter(at, content);
  ++s.generation;
  return {at, s.generation};
}

void HostSlots::undo_take(const SlotName& name) {
  KVMEM_ASSERT(!takes_.empty() && takes_.back().slot == name.slot && has(name), "the latest take is undone first");
  const Take before = takes_.back();
  takes_.pop_back();
  leave(name.slot);
  --slots_[name.slot].generation;  // nobody has seen the name that was undone
  before.taken ? enter(name.slot, before.before) : free_[group_of(name.slot)].push_back(name.slot);
}

// The content enters the order of eviction, as used latest.
void HostSlots::enter(i64 slot, const SlotContent& content) {
  Order& order = order_of(slot);
  Slot& s = slots_[slot];
  s.taken = true, s.dropped = false, s.content = content;
  const auto is_there = [&](std::uint64_t key) {
    const i32 id = order.ids.find(key);
    return id >= 0 && order.slots[id] >= 0;
  };
  while (is_there(s.content.key)) ++s.content.key;  // another slot has it, and is held: this one counts as different
  s.id = order.ids.use(s.content.key);
  s.parent_id = content.parent == 0 ? -1 : order.ids.use(content.parent);
  order.slots[s.id] = slot;
  order.policy.insert(s.id, s.content.key, s.parent_id);
  if (content.priority.is_set()) order.policy.retain(s.id, content.priority.level, content.priority.seconds);
  order.policy.release(s.id);
}

void HostSlots::leave(i64 slot) {
  Order& order = order_of(slot);
  Slot& s = slots_[slot];
  KVMEM_ASSERT(s.taken && s.holds == 0, "the slot has content, and nothing uses it");
  order.policy.evict(s.id, s.content.key, s.parent_id);
  order.slots[s.id] = -1;
  order.ids.drop(s.id);
  if (s.parent_id >= 0) order.ids.drop(s.parent_id);
  s.id = s.parent_id = -1;
  s.taken = s.dropped = false;
}

void HostSlots::lose(i64 slot) {
  if (!slots_[slot].taken) return;
  free(slot);
  ++lost_;
}

void HostSlots::free(i64 slot) {
  leave(slot);
  free_[group_of(slot)].push_back(slot);
}

bool HostSlots::hold(const SlotName& name) {
  if (!has(name) || slots_[name.slot].dropped) return false;
  if (slots_[name.slot].holds++ == 0) order_of(name.slot).policy.use(slots_[name.slot].id);
  return true;
}

void HostSlots::release(const SlotName& name) {
  KVMEM_ASSERT(has(name) && slots_[name.slot].holds > 0, "the slot is held");
  if (--slots_[name.slot].holds > 0) return;
  order_of(name.slot).policy.release(slots_[name.slot].id);
  if (slots_[name.slot].dropped) free(name.slot);
}

void HostSlots::drop(const SlotName& name) {
  if (!has(name)) return;
  if (slots_[name.slot].holds > 0) {
    slots_[name.slot].dropped = true;
  } else {
    free(name.slot);
  }
}

void HostSlots::digest(Hasher& hash) const {
  for (const Slot& s : slots_)
    hash.add(s.taken, s.dropped, s.holds, s.taken ? s.generation : 0, s.taken ? s.content.key : 0);
}

void HostSlots::check(std::vector<std::string>* out) const {
  for (i64 g = 0; g < groups(); ++g) {
    i64 taken = 0;
    for (i64 slot = first_[g]; slot < first_[g + 1]; ++slot) taken += slots_[slot].taken;
    const bool all_free = std::all_of(free_[g].begin(), free_[g].end(), [&](i64 slot) {
      return slot >= first_[g] && slot < first_[g + 1] && !slots_[slot].taken;
    });
    if (taken + free_count(g) == count(g) && all_free) continue;
    out->push_back("of the " + std::to_string(count(g)) + " host slots of group " + std::to_string(g) + ", " +
                   std::to_string(taken) + " are taken and " + std::to_string(free_count(g)) + " are listed as free");
  }
  for (std::size_t slot = 0; slot < slots_.size(); ++slot) {
    const Slot& s = slots_[slot];
    const Order& order = *orders_[group_of(static_cast<i64>(slot))];
    if (s.taken && (order.ids.find(s.content.key) != s.id || order.slots[s.id] != static_cast<i64>(slot))) {
      out->push_back("host slot " + std::to_string(slot) + " is not in the order of eviction under its content");
    }
    if (s.holds >= 0 && (s.taken || s.holds == 0) && (!s.dropped || s.holds > 0)) continue;
    out->push_back("host slot " + std::to_string(slot) + " has " + std::to_string(s.holds) + " holds, and is " +
                   (s.taken ? "taken" : "free") + (s.dropped ? " and dropped" : ""));
  }
}

}  // namespace kvmem
