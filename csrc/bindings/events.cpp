// kvmem._core.EventRecords, a batch of cache events; and EventRing, the queue of an allocator, for tests without one.

#include "index/events.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "bindings/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvmem {
namespace {

using Tokens = nb::ndarray<const i32, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// Returns the arguments of stored() for all cached content, as tuples.
using Walk = nb::typed<nb::callable, nb::typed<nb::iterable, nb::object>()>;

// Returns a read-only view, which keeps the records alive.
template <class T, std::vector<T> EventRecords::* Field>
nb::ndarray<nb::numpy, const T, nb::ndim<1>> column(nb::handle_t<EventRecords> self) {
  const std::vector<T>& values = nb::cast<const EventRecords&>(self).*Field;
  return {values.data(), {values.size()}, self};
}

// Returns kind, node, parent, root, group and ordinal of each record. For few records that is several times faster than
// the columns, each of which is an object of numpy.
nb::list rows(const EventRecords& r) {
  nb::list found;
  for (size_t i = 0; i < r.kinds.size(); ++i) {
    found.append(nb::make_tuple(r.kinds[i], r.nodes[i], r.parents[i], r.roots[i], r.groups[i], r.ordinals[i]));
  }
  return found;
}

nb::ndarray<nb::numpy, const i32, nb::ndim<2>> token_rows(nb::handle_t<EventRecords> self) {
  const auto& records = nb::cast<const EventRecords&>(self);
  const size_t width = static_cast<size_t>(records.block_tokens);
  return {records.tokens.data(), {records.tokens.size() / width, width}, self};
}

const i32* block_of(const Tokens& tokens, i64 block_tokens) {
  if (static_cast<i64>(tokens.size()) != block_tokens) {
    throw SpecError("tokens: got " + std::to_string(tokens.size()) + "; a block has " + std::to_string(block_tokens));
  }
  return tokens.data();
}

}  // namespace

void bind_events(nb::module_& m) {
  nb::class_<EventRecords>(m, "EventRecords")
      .def("__len__", &EventRecords::size)
      .def_prop_ro("kinds", column<std::int8_t, &EventRecords::kinds>)
      .def_prop_ro("nodes", column<i32, &EventRecords::nodes>)
      .def_prop_ro("parents", column<i32, &EventRecords::parents>)
      .def_prop_ro("roots", column<i32, &EventRecords::roots>)
      .def_prop_ro("groups", column<i32, &EventRecords::groups>)
      .def_prop_ro("ordinals", column<i32, &EventRecords::ordinals>)
      .def_prop_ro("tiers", column<i32, &EventRecords::tiers>)
      .def("rows", &rows, nb::sig("def rows(self) -> list[tuple[int, int, int, int, int, int]]"))
      .def_prop_ro("tokens", token_rows)
      .def_prop_ro(
          "tags",
          [](const EventRecords& records) {
            nb::list tags;
            for (const Tag& tag : records.tags) {
              tags.append(tag ? nb::object(nb::bytes(tag->data(), tag->size())) : nb::none());
            }
            return tags;
          },
          nb::sig("def tags(self) -> list[bytes | None]"));

  nb::class_<EventRing>(m, "EventRing")
      .def(nb::init<i64, i64>(), "capacity"_a, "block_tokens"_a)
      .def(
          "stored",
          [](EventRing& self, i32 node, i32 parent, i32 root, i32 group, i32 ordinal, const Tokens& tokens, i32 tier) {
            self.stored(node, parent, root, group, ordinal, block_of(tokens, self.block_tokens()), tier);
          },
          "node"_a, "parent"_a, "root"_a, "group"_a, "ordinal"_a, "tokens"_a.noconvert(), "tier"_a = 0)
      .def("removed", &EventRing::removed, "node"_a, "group"_a, "tier"_a = 0)
      .def("cleared", &EventRing::cleared)
      .def(
          "drain",
          [](EventRing& self, i64 max, const Walk& resident, bool restart) {
            const auto walk = [&](EventRecords& out) {
              for (nb::handle item : resident()) {
                const auto [node, parent, root, group, ordinal, tokens, tier] =
                    nb::cast<std::tuple<i32, i32, i32, i32, i32, Tokens, i32>>(item);
                out.stored(node, parent, root, group, ordinal, block_of(tokens, out.block_tokens), tier);
              }
            };
            return self.drain(max, walk, restart);
          },
          "max"_a, "resident"_a, "restart"_a = false)
      .def_prop_ro("on", &EventRing::on)
      .def("__len__", &EventRing::size)
      .def_prop_ro("serial", &EventRing::serial)
      .def_prop_ro("lost", &EventRing::lost);
}

}  // namespace kvmem
