// kvmem._core.PagePool, Allocator, and the types of their arguments. kvmem.PagePool and kvmem.Allocator document them.

#include "allocator/allocator.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bindings/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvmem {
namespace {

OpKind kind_of(const std::string& name) {
  std::string names;
  for (int i = 0; i < kPublicOps; ++i) {
    if (name == kOps[i].name) return static_cast<OpKind>(i);
    names += (i > 0 ? ", " : "") + std::string(kOps[i].name);
  }
  throw SpecError("op kind '" + name + "' is not one of " + names);
}

nb::tuple to_record(const Op& op) { return nb::make_tuple(row_of(op.kind).name, op.at, op.a, op.b, op.c, op.d); }

nb::list to_records(const std::vector<Op>& ops) {
  nb::list out;
  for (const Op& op : ops) out.append(to_record(op));
  return out;
}

std::vector<Op> from_records(const nb::sequence& records) {
  std::vector<Op> ops;
  for (nb::handle item : records) {
    // A copy, because another thread may change a list while its entries are converted.
    const bool is_record = nb::isinstance<nb::sequence>(item) && !nb::isinstance<nb::str>(item);
    const nb::object record = is_record ? nb::steal(PySequence_Tuple(item.ptr())) : nb::object();
    if (is_record && !record.is_valid()) nb::raise_python_error();
    bool good = is_record && PyTuple_GET_SIZE(record.ptr()) == 6;
    std::string name;
    i64 value[5];
    good = good && nb::try_cast(nb::handle(PyTuple_GET_ITEM(record.ptr(), 0)), name);
    for (int i = 0; i < 5; ++i) {
      good = good && nb::try_cast(nb::handle(PyTuple_GET_ITEM(record.ptr(), i + 1)), value[i], false);
    }
    if (!good || value[0] < 0 || value[0] > INT32_MAX) {
      throw SpecError("an op is (kind, at, a, b, c, d): one name and five integers, the first an int32");
    }
    ops.push_back({kind_of(name), static_cast<i32>(value[0]), value[1], value[2], value[3], value[4]});
    // Checked here, because another version may have op kinds that are unknown here.
    if (ops.back().kind == OpKind::version) check_version(ops.back());
  }
  return ops;
}

void bind_ops(nb::module_& m) {
  m.def(
      "op_kinds",
      [] {
        nb::list kinds;
        for (int i = 0; i < kPublicOps; ++i) {
          kinds.append(nb::make_tuple(kOps[i].name, kOps[i].role == OpRole::physical, kOps[i].fields));
        }
        return kinds;
      },
      nb::sig("def op_kinds() -> list[tuple[str, bool, str]]"));  // name, executed by a device, fields
  m.def(
      "ops_header", [] { return to_record({OpKind::version, 0, kOpsVersion}); },
      nb::sig("def ops_header() -> tuple[str, int, int, int, int, int]"));
}

void bind_geometry(nb::module_& m) {
  nb::enum_<Growth>(m, "Growth")
      .value("token", Growth::token)
      .value("prefill", Growth::prefill)
      .value("fixed", Growth::fixed);
  nb::enum_<Zero>(m, "Zero").value("never", Zero::never).value("fresh", Zero::fresh).value("always", Zero::always);
  using Sizes = std::vector<i64>;
  nb::class_<GroupGeometry>(m, "GroupGeometry")
      .def("__init__", &construct<GroupGeometry, Growth, i64, i64, i64, i64, i64, Sizes, Sizes, Sizes, bool>,
           nb::kw_only(), "growth"_a, "block_tokens"_a, "window_tokens"_a, "max_tokens"_a, "row_tokens"_a,
           "max_blocks"_a, "token_bytes"_a, "row_slots"_a, "arena_slots"_a, "whole_blocks"_a = false)
      .def_ro("row_tokens", &GroupGeometry::row_tokens)
      .def_ro("max_blocks", &GroupGeometry::max_blocks)
      .def_ro("arena_slots", &GroupGeometry::arena_slots);
  nb::class_<Geometry>(m, "Geometry")
      .def("__init__", &construct<Geometry, i64, i64, i64, i64, i64, Zero, bool, std::vector<GroupGeometry>>,
           nb::kw_only(), "page_bytes"_a, "max_sequences"_a, "rows"_a, "tail_guard_tokens"_a, "map_ahead_tokens"_a,
           "zero"_a, "debug"_a, "groups"_a);
}

void bind_pool(nb::module_& m) {
  nb::class_<PagePool>(m, "PagePool")
      .def("__init__", &construct<PagePool, i64, i64, std::shared_ptr<Driver>, bool>, nb::kw_only(), "page_bytes"_a,
           "budget_pages"_a, "driver"_a.none(), "create_ahead"_a, Free())
      .def_prop_ro("page_bytes", &PagePool::page_bytes)
      .def_prop_ro("budget_pages", [](PagePool& p) { return p.lock(), p.budget_pages(); })
      .def_prop_ro("present_pages", [](PagePool& p) { return p.lock(), p.present_pages(); })
      .def_prop_ro("mapped_pages", [](PagePool& p) { return p.lock(), p.mapped_pages(); })
      .def_prop_ro("driver_calls", [](PagePool& p) { return p.lock(), p.driver_calls(); })
      .def("driver_counters", [](PagePool& p) { return p.lock(), p.driver_counters(); })
      .def(
          "set_budget",
          [](PagePool& p, i64 pages) {
            auto lock = p.lock();
            p.settle();
            p.shrink_in_pieces(lock, pages);
            p.set_budget(pages);
          },
          "pages"_a, Free())
      .def(
          "set_stream",
          [](PagePool& p, Stream stream, bool only) {
            const auto lock = p.lock();
            if (p.space()) p.space()->use_stream(stream, only);
          },
          "stream"_a, "only"_a = true, Free())
      .def(
          "page_handle",
          [](PagePool& p, i64 page) {
            const auto lock = p.lock();
            return p.space() ? p.space()->page_handle(page) : PageHandle{0};
          },
          "page"_a, Free());
}

void bind_stats(nb::module_& m) {
  nb::class_<AllocatorStats>(m, "AllocatorStats")
      .def_ro("budget_bytes", &AllocatorStats::budget_bytes)
      .def_ro("created_bytes", &AllocatorStats::created_bytes)
      .def_ro("free_bytes", &AllocatorStats::free_bytes)
      .def_ro("mapped_bytes", &AllocatorStats::mapped_bytes)
      .def_ro("used_bytes", &AllocatorStats::used_bytes)
      .def_ro("arena_used_bytes", &AllocatorStats::arena_used_bytes)
      .def_ro("parked_bytes", &AllocatorStats::parked_bytes)
      .def_ro("held_bytes", &AllocatorStats::held_bytes)
      .def_ro("limit_bytes", &AllocatorStats::limit_bytes)
      .def_ro("cached_beside_bytes", &AllocatorStats::cached_beside_bytes)
      .def_ro("shared_bytes", &AllocatorStats::shared_bytes)
      .def_ro("num_sequences", &AllocatorStats::num_sequences)
      .def_ro("driver_calls", &AllocatorStats::driver_calls)
      .def_ro("physical_bytes", &AllocatorStats::physical_bytes)
      .def_ro("cached_bytes", &AllocatorStats::cached_bytes)
      .def_ro("cached_blocks", &AllocatorStats::cached_blocks)
      .def_ro("pinned_blocks", &AllocatorStats::pinned_blocks)
      .def_ro("evicted_blocks", &AllocatorStats::evicted_blocks)
      .def_ro("lookup_tokens", &AllocatorStats::lookup_tokens)
      .def_ro("hit_tokens", &AllocatorStats::hit_tokens);
}

void bind_sequences(nb::module_& m) {
  const auto sizes = [](Sequences* self, i64 max_sequences, i64 first) {
    new (self) Sequences(max_sequences, 1, first);
  };
  nb::class_<Sequences>(m, "Sequences")  // for tests
      .def("__init__", sizes, "max_sequences"_a, "first"_a = 1)
      .def("open",
           [](Sequences& self) {
             const i64 handle = self.next_handle();
             self.on_open(handle, false);
             return handle;
           })
      .def(
          "close", [](Sequences& self, i64 handle) { self.on_close(handle, false); }, "handle"_a)
      .def(
          "undo_open", [](Sequences& self, i64 handle) { self.on_close(handle, true); }, "handle"_a)
      .def(
          "undo_close", [](Sequences& self, i64 handle) { self.on_open(handle, true); }, "handle"_a)
      .def("index", &Sequences::index, "handle"_a)
      .def("next_handle", &Sequences::next_handle);
}

// Returns [begin, begin + bytes) of one arena (-1: to its end) as a flat tensor of bytes (DLPack). The tensor keeps the
// allocator alive, because the end of an allocator unmaps its arenas.
nb::ndarray<std::uint8_t> arena_bytes(nb::handle_t<Allocator> self, i64 group, i64 arena_in_group, i64 begin,
                                      i64 bytes) {
  auto& cache = nb::cast<Allocator&>(self);
  cache.check_usable();
  Space* space = cache.pool().space();
  if (!space) throw DeviceError("device \"meta\" has metadata only: there is no memory to show");
  const i32 arena = static_cast<i32>(cache.first_arena(group) + arena_in_group);
  const Address base = space->arena_base(arena);
  const i64 all = space->arena_bytes(arena);
  if (bytes < 0) bytes = all - begin;
  if (begin < 0 || begin > all || bytes < 0 || bytes > all - begin) {
    throw SpecError("arena_bytes: [" + std::to_string(begin) + ", +" + std::to_string(bytes) + ") of " +
                    std::to_string(all) + " bytes");
  }
  const size_t shape[1] = {static_cast<size_t>(bytes)};
  const DriverInfo& info = space->info();
  return nb::ndarray<std::uint8_t>(reinterpret_cast<void*>(base + static_cast<Address>(begin)), 1, shape, self, nullptr,
                                   nb::dtype<std::uint8_t>(), info.dlpack_device_type, info.device_index);
}

template <i64 Sequences::Lengths::* kWhich>
i64 length_of(Allocator& c, i64 handle, i64 group) {
  return c.lengths(handle, group).*kWhich;
}

// Writes what kFind finds for n handles, n - kFewer numbers, to `out`. Releases Python's lock meanwhile.
template <void (Allocator::*kFind)(const i32*, i64, i64, i64*), i64 kFewer>
void find_shared(nb::handle_t<Allocator> self, nb::handle handles, i64 group, Out<i64> out) {
  const Handles ids("handles", handles, self);
  const i64 n = ids.size(), wanted = std::max(n - kFewer, i64{0});
  if (static_cast<i64>(out.shape(0)) < wanted) {
    throw SpecError(kFewer == 0 ? "order needs an entry for each handle"
                                : "blocks needs an entry for each pair of neighbours");
  }
  std::vector<i64> found(n);
  auto& a = nb::cast<Allocator&>(self);
  {
    const WithoutGil free;
    (a.*kFind)(ids.data(), n, group, found.data());
  }
  std::copy_n(found.data(), wanted, out.data());
}

nb::class_<Allocator> bind_calls(nb::module_& m) {
  using Pool = std::shared_ptr<PagePool>;
  return nb::class_<Allocator>(m, "Allocator")
      .def("__init__", &construct<Allocator, const Geometry&, Pool, bool, i64, bool, const PrefixOptions&>,
           nb::kw_only(), "geometry"_a, "pool"_a, "paged"_a, "limit_pages"_a, "owns_pool"_a, "prefix"_a, Free())
      .def("open",
           [](Allocator& c) {
             i32 handle = 0;
             c.open(1, &handle);
             return handle;
           })
      .def(
          "open_batch",
          [](Allocator& c, const WritableInt32s& handles) {
            std::vector<i32> opened(handles.size());
            c.open(handles.size(), opened.data());
            handles.write(opened.data(), handles.size());
          },
          "handles"_a.noconvert())
      .def("truncate", &Allocator::truncate, "handle"_a, "tokens"_a)
      .def(
          "fork",
          [](Allocator& c, i64 handle, nb::handle sequence) {
            const i64 child = c.fork(handle);
            store_in(sequence, "_id", child);
            return child;
          },
          "handle"_a, "sequence"_a = nb::none())
      .def("first_arena", &Allocator::first_arena, "group"_a)
      .def("check_usable", &Allocator::check_usable)
      .def("is_live", &Allocator::is_live, "handle"_a)
      .def("tokens", length_of<&Sequences::Lengths::tokens>, "handle"_a, "group"_a = -1)
      .def("committed", length_of<&Sequences::Lengths::committed>, "handle"_a, "group"_a = -1)
      .def("first_token", length_of<&Sequences::Lengths::front>, "handle"_a, "group"_a = -1)
      .def("close", &Allocator::close)
      .def("can_fit", &Allocator::can_fit, "tokens"_a)
      .def("age_seconds", &Allocator::age_seconds, "handle"_a)
      .def(
          "lengths",
          [](nb::handle_t<Allocator> self, nb::handle handles, i64 group, Out<i64> tokens, Out<i64> committed) {
            const Handles ids("handles", handles, self);
            if (static_cast<i64>(std::min(tokens.shape(0), committed.shape(0))) < ids.size()) {
              throw SpecError("tokens and committed need an entry for each handle");
            }
            nb::cast<Allocator&>(self).lengths(ids.data(), ids.size(), group, tokens.data(), committed.data());
          },
          "handles"_a.none(), "group"_a, "tokens"_a.noconvert(), "committed"_a.noconvert())
      .def(
          "row", [](Allocator& c, i64 handle, i64 group) { return c.place(handle, group).row; }, "handle"_a,
          "group"_a = -1)
      .def("common_blocks", &find_shared<&Allocator::common_blocks, 1>, "handles"_a.none(), "group"_a,
           "out"_a.noconvert())
      .def("cascade_order", &find_shared<&Allocator::cascade_order, 0>, "handles"_a.none(), "group"_a,
           "out"_a.noconvert())
      .def("compact", &Allocator::compact, "bytes"_a)
      .def("trim", &Allocator::trim, "bytes"_a)
      .def("set_memory", &Allocator::set_memory, "pages"_a)
      .def("stats", &Allocator::stats, Free())
      .def("check", &Allocator::check, Free())
      .def("digest", &Allocator::digest, Free())
      .def("record", &Allocator::record)
      .def(
          "take_ops", [](Allocator& c) { return to_records(c.take_ops()); },
          nb::sig("def take_ops(self) -> list[tuple[str, int, int, int, int, int]]"))
      .def(
          "apply", [](Allocator& c, const nb::sequence& records) { c.apply(from_records(records)); }, "ops"_a,
          nb::sig("def apply(self, ops: Sequence[Sequence[str | int]]) -> None"))
      .def("arena_bytes", &arena_bytes, "group"_a, "arena"_a, "begin"_a = 0, "bytes"_a = -1)
      .def("mapped_extent_bytes", &Allocator::mapped_extent_bytes, "group"_a, "arena"_a, Free())
      .def("handles", &Allocator::handles, Free());
}

}  // namespace

void bind_allocator(nb::module_& m) {
  bind_ops(m);
  bind_geometry(m);
  bind_pool(m);
  bind_stats(m);
  bind_sequences(m);
  bind_prefix_options(m);
  nb::class_<Allocator> allocator = bind_calls(m);
  bind_steps(allocator);
  bind_batch(m, allocator);
  bind_prefix(allocator);
  bind_tiers(allocator);
  bind_table_changes(m, allocator);
}

}  // namespace kvmem
