// The calls of kvmem._core.Allocator about host slots. kvmem/allocator/tiers/engine.py is their only user.

#include <nanobind/ndarray.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "allocator/allocator.h"
#include "bindings/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvmem {
namespace {

using Name = std::pair<i64, i64>;  // slot and generation

// Calls f(slots, name) for each name, under the lock; returns which of them were true.
template <class F>
std::vector<bool> each(Allocator& a, const std::vector<Name>& names, const F& f) {
  const LockedTiers tiers(a);
  std::vector<bool> found;
  for (const auto& [slot, generation] : names) found.push_back(f(tiers->slots(), SlotName{slot, generation}));
  return found;
}

// Returns the bytes of all host slots as one array, which keeps their memory.
nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>> host_bytes(Allocator& a) {
  auto* const memory = new std::shared_ptr<HostMemory>(LockedTiers(a)->slots().memory());
  const nb::capsule owner(memory, [](void* p) noexcept { delete static_cast<std::shared_ptr<HostMemory>*>(p); });
  const size_t shape[1] = {static_cast<size_t>((*memory)->bytes())};
  return {(*memory)->data(), 1, shape, owner};
}

}  // namespace

void free_any(Allocator& allocator, const i32* handles, i64 n) {
  try {
    allocator.free(handles, n);
  } catch (const NotReady&) {
    const std::vector<i32> ended = LockedTiers(allocator)->end_pending(handles, n);
    try {
      allocator.free(handles, n);
    } catch (...) {
      LockedTiers(allocator)->mark_pending_again(ended);
      throw;
    }
  }
}

void bind_tiers(nb::class_<Allocator>& allocator) {
  allocator
      .def(
          "open_host_slots",
          [](Allocator& a, const std::vector<i64>& counts, const std::string& policy) {
            LockedTiers(a)->open(counts, policy);
          },
          "counts"_a, "policy"_a)
      .def("host_bytes", &host_bytes)
      .def(
          "slot_bytes",
          [](Allocator& a, i64 group) {
            a.groups().check(group);
            return LockedTiers(a)->slot_bytes(group);
          },
          "group"_a)
      .def(
          "slot_offset", [](Allocator& a, i64 slot) { return LockedTiers(a)->slots().offset(slot); }, "slot"_a)
      .def(
          "free_slots",
          [](Allocator& a, i64 group) {
            a.groups().check(group);
            return LockedTiers(a)->slots().free_count(group);
          },
          "group"_a)
      .def("lost_slots", [](Allocator& a) { return LockedTiers(a)->slots().lost(); })
      .def(
          "take_slot",  // held
          [](Allocator& a, i64 group, std::uint64_t key, std::uint64_t parent) {
            a.groups().check(group);
            const LockedTiers tiers(a);
            const SlotName name = tiers->slots().take(group, {key, parent, {}});
            tiers->slots().confirm_takes();
            if (name.slot >= 0) tiers->slots().hold(name);
            return Name{name.slot, name.generation};
          },
          "group"_a, "key"_a, "parent"_a)
      .def(
          "hold_slots",
          [](Allocator& a, const std::vector<Name>& names) {
            return each(a, names, [](HostSlots& slots, const SlotName& name) { return slots.hold(name); });
          },
          "names"_a)
      .def(
          "release_slots",
          [](Allocator& a, const std::vector<Name>& names) {
            each(a, names, [](HostSlots& slots, const SlotName& name) { return slots.release(name), true; });
          },
          "names"_a)
      .def(
          "drop_slots",
          [](Allocator& a, const std::vector<Name>& names) {
            each(a, names, [](HostSlots& slots, const SlotName& name) { return slots.drop(name), true; });
          },
          "names"_a)
      .def(
          "has_slots",
          [](Allocator& a, const std::vector<Name>& names) {
            return each(a, names, [](HostSlots& slots, const SlotName& name) { return slots.has(name); });
          },
          "names"_a)
      .def(
          "first_needed",
          [](Allocator& a, i64 group, i64 tokens) {
            a.groups().check(group);
            return LockedTiers(a)->first_needed(group, tokens);
          },
          "group"_a, "tokens"_a)
      .def(
          "residency",
          [](Allocator& a, nb::handle tokens, const nb::bytes& salt, const nb::bytes& extra_key) {
            const TokenIds ids(tokens);
            const PrefixKey key = key_of(salt, extra_key);
            std::vector<std::uint8_t> found;
            {
              const WithoutGil free;
              found = LockedTiers(a)->residency(ids.data(), ids.size(), key);
            }
            return nb::bytes(found.data(), found.size());
          },
          "tokens"_a, "salt"_a, "extra_key"_a)
      .def(
          "promote",
          [](Allocator& a, nb::handle tokens, const nb::bytes& salt, const nb::bytes& extra_key,
             const std::vector<i64>& slots) {
            const TokenIds ids(tokens);
            const PrefixKey key = key_of(salt, extra_key);
            const WithoutGil free;
            LockedTiers::promote(a, ids.data(), ids.size(), key, slots);
          },
          "tokens"_a, "salt"_a, "extra_key"_a, "slots"_a)
      .def(
          "store",
          [](Allocator& a, nb::handle tokens, const nb::bytes& salt, const nb::bytes& extra_key,
             const std::vector<bool>& wanted) {
            const TokenIds ids(tokens);
            const PrefixKey key = key_of(salt, extra_key);
            const WithoutGil free;
            LockedTiers::store(a, ids.data(), ids.size(), key, wanted);
          },
          "tokens"_a, "salt"_a, "extra_key"_a, "wanted"_a)
      .def(
          "drain_moves",
          [](Allocator& a, i64 taken, bool restart) {
            return to_python([&] {
              std::shared_ptr<EventBatch> expired;
              return LockedTiers(a)->moves.drain(taken, -1, restart, &expired);
            });
          },
          "taken"_a, "restart"_a = false,
          nb::sig("def drain_moves(self, taken: int, restart: bool = False) -> tuple[int, EventRecords, dict[int, "
                  "tuple[bytes, bytes]]]"))
      .def(
          "set_pending", [](Allocator& a, i64 handle) { LockedTiers(a)->set_pending(handle); }, "handle"_a)
      .def(
          "admit_pending",
          [](Allocator& a, i64 handle, nb::handle tokens, const nb::bytes& salt, const nb::bytes& extra_key) {
            const TokenIds ids(tokens);
            const PrefixKey key = key_of(salt, extra_key);
            const WithoutGil free;
            return LockedTiers::admit(a, handle, ids.data(), ids.size(), key);
          },
          "handle"_a, "tokens"_a, "salt"_a, "extra_key"_a)
      .def("latest_fence", [](Allocator& a) { return LockedTiers(a), a.pool().fence(); })
      .def(
          "has_passed",
          [](Allocator& a, i64 fence) {
            const WithoutGil free;
            Space* const space = a.pool().space();
            return !space || space->has_passed(fence);
          },
          "fence"_a);
}

}  // namespace kvmem
