// kvmem._core.PagePool, Allocator and what they take.

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

using Free = nb::call_guard<WithoutGil>;

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
    // A tuple of its own: a list may change while its entries are converted.
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
    // At once: those that follow may be of kinds that are not known here.
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
      nb::sig("def op_kinds() -> list[tuple[str, bool, str]]"),
      "Of each kind of record that stands in a list: its name, whether a device executes it, what its numbers say.");
  m.def(
      "ops_header", [] { return to_record({OpKind::version, 0, kOpsVersion}); },
      nb::sig("def ops_header() -> tuple[str, int, int, int, int, int]"), "The record that every list begins with.");
}

void bind_geometry(nb::module_& m) {
  nb::enum_<Growth>(m, "Growth")
      .value("token", Growth::token)
      .value("prefill", Growth::prefill)
      .value("fixed", Growth::fixed);
  nb::enum_<Zero>(m, "Zero").value("never", Zero::never).value("fresh", Zero::fresh).value("always", Zero::always);
  nb::class_<GroupGeometry>(m, "GroupGeometry", "Where one group's tokens lie; see kvmem.layouts.")
      .def(
          "__init__",
          [](GroupGeometry* self, Growth growth, i64 block_tokens, i64 window_tokens, i64 max_tokens, i64 row_tokens,
             i64 max_blocks, std::vector<i64> token_bytes, std::vector<i64> row_slots, std::vector<i64> arena_slots) {
            new (self) GroupGeometry{growth,
                                     block_tokens,
                                     window_tokens,
                                     max_tokens,
                                     row_tokens,
                                     max_blocks,
                                     std::move(token_bytes),
                                     std::move(row_slots),
                                     std::move(arena_slots)};
          },
          nb::kw_only(), "growth"_a, "block_tokens"_a, "window_tokens"_a, "max_tokens"_a, "row_tokens"_a,
          "max_blocks"_a, "token_bytes"_a, "row_slots"_a, "arena_slots"_a)
      .def_ro("row_tokens", &GroupGeometry::row_tokens)
      .def_ro("max_blocks", &GroupGeometry::max_blocks)
      .def_ro("arena_slots", &GroupGeometry::arena_slots);
  nb::class_<Geometry>(m, "Geometry")
      .def(
          "__init__",
          [](Geometry* self, i64 page_bytes, i64 max_sequences, i64 rows, i64 tail_guard_tokens, i64 map_ahead_tokens,
             Zero zero, bool debug, std::vector<GroupGeometry> groups) {
            new (self) Geometry{page_bytes,       max_sequences, rows,  tail_guard_tokens,
                                map_ahead_tokens, zero,          debug, std::move(groups)};
          },
          nb::kw_only(), "page_bytes"_a, "max_sequences"_a, "rows"_a, "tail_guard_tokens"_a, "map_ahead_tokens"_a,
          "zero"_a, "debug"_a, "groups"_a);
}

void bind_pool(nb::module_& m) {
  nb::class_<PagePool>(m, "PagePool", "Physical pages under one budget; see kvmem.PagePool.")
      .def(
          "__init__",
          [](PagePool* self, i64 page_bytes, i64 budget_pages, std::shared_ptr<Driver> driver, bool create_ahead) {
            new (self) PagePool(page_bytes, budget_pages, std::move(driver), create_ahead);
          },
          nb::kw_only(), "page_bytes"_a, "budget_pages"_a, "driver"_a.none(), "create_ahead"_a, Free())
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
          "stream"_a, "only"_a = true, Free(),
          "Kernels use the memory on this stream from now on; unless it is the only one, also on those before.")
      .def(
          "page_handle",
          [](PagePool& p, i64 page) {
            const auto lock = p.lock();
            return p.space() ? p.space()->page_handle(page) : PageHandle{0};
          },
          "page"_a, Free(), "The driver's handle of a page; 0 where there is none.");
}

void bind_stats(nb::module_& m) {
  nb::class_<AllocatorStats>(m, "AllocatorStats")
      .def_ro("budget_bytes", &AllocatorStats::budget_bytes)
      .def_ro("created_bytes", &AllocatorStats::created_bytes)
      .def_ro("free_bytes", &AllocatorStats::free_bytes)
      .def_ro("mapped_bytes", &AllocatorStats::mapped_bytes)
      .def_ro("used_bytes", &AllocatorStats::used_bytes)
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
  nb::class_<Sequences>(m, "Sequences", "Handles, by themselves; see csrc/table/sequences.h.")
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

// [begin, begin + bytes) of one arena (-1: to its end) as a flat tensor of bytes (DLPack). The tensor owns a reference
// to the cache, since a cache that goes unmaps its arenas: whoever still looks at the memory keeps it.
nb::ndarray<std::uint8_t> arena_bytes(nb::handle_t<Allocator> self, i64 group, i64 arena_in_group, i64 begin,
                                      i64 bytes) {
  auto& cache = nb::cast<Allocator&>(self);
  cache.check_usable();
  Space* space = cache.pool().space();
  if (!space) throw DeviceError("device \"meta\" keeps the books only: it has no memory to show");
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

// Fills `out` with what `find` finds of `handles`, without Python's lock: n - `fewer` numbers. `too_short`: the error
// for a shorter array.
template <class Find>
void find_alike(nb::handle self, nb::handle handles, i64 fewer, const char* too_short, const Out<i64>& out,
                const Find& find) {
  const Handles ids("handles", handles, self);
  const i64 n = ids.size(), wanted = std::max(n - fewer, i64{0});
  if (static_cast<i64>(out.shape(0)) < wanted) throw SpecError(too_short);
  std::vector<i64> found(n);
  {
    const WithoutGil free;
    find(ids.data(), n, found.data());
  }
  std::copy_n(found.data(), wanted, out.data());
}

void common_blocks(nb::handle_t<Allocator> self, nb::handle handles, i64 group, Out<i64> blocks) {
  auto& a = nb::cast<Allocator&>(self);
  find_alike(self, handles, 1, "blocks needs an entry for each pair of neighbours", blocks,
             [&](const i32* ids, i64 n, i64* out) { a.common_blocks(ids, n, group, out); });
}

void cascade_order(nb::handle_t<Allocator> self, nb::handle handles, i64 group, Out<i64> order) {
  auto& a = nb::cast<Allocator&>(self);
  find_alike(self, handles, 0, "order needs an entry for each handle", order,
             [&](const i32* ids, i64 n, i64* out) { a.cascade_order(ids, n, group, out); });
}

nb::class_<Allocator> bind_calls(nb::module_& m) {
  return nb::class_<Allocator>(m, "Allocator",
                               "Sequences over one of the two page tables; kvmem.Allocator is its public face.")
      .def(
          "__init__",
          [](Allocator* self, const Geometry& geometry, std::shared_ptr<PagePool> pool, bool paged, i64 limit_pages,
             bool owns_pool, const PrefixOptions& prefix) {
            new (self) Allocator(geometry, std::move(pool), paged, limit_pages, owns_pool, prefix);
          },
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
            keep_in(sequence, "_id", child);
            return child;
          },
          "handle"_a, "sequence"_a = nb::none(), "The new handle; also told to the object that stands for it.")
      .def("first_arena", &Allocator::first_arena, "group"_a, "Its number, as ops name it.")
      .def("check_usable", &Allocator::check_usable, "DeviceError in a forked child, and where the pool is poisoned.")
      .def("is_live", &Allocator::is_live, "handle"_a)
      .def("tokens", &Allocator::tokens, "handle"_a, "group"_a = -1)
      .def("committed", &Allocator::committed, "handle"_a, "group"_a = -1)
      .def("first_token", &Allocator::first_token, "handle"_a, "group"_a = -1)
      .def("close", &Allocator::close, "False where the pool is poisoned, so that nothing can be freed.")
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
      .def("common_blocks", &common_blocks, "handles"_a.none(), "group"_a, "blocks"_a.noconvert())
      .def("cascade_order", &cascade_order, "handles"_a.none(), "group"_a, "order"_a.noconvert())
      .def("compact", &Allocator::compact, "bytes"_a)
      .def("trim", &Allocator::trim, "bytes"_a)
      .def("set_memory", &Allocator::set_memory, "pages"_a)
      .def("stats", &Allocator::stats, Free())
      .def("check", &Allocator::check, Free())
      .def("digest", &Allocator::digest, Free(),
           "64 bits made of all that a later call could see, and how often a driver has failed when memory was written "
           "or in the mapper, or the eviction order has aged. A call that is refused leaves the first, unless the "
           "second has moved.")
      .def("record", &Allocator::record)
      .def("watch_lost", &Allocator::watch_lost, "For tests: take_lost() says what leaves the cache from now on.")
      .def(
          "take_lost",
          [](Allocator& c) {
            nb::list lost;
            for (const PageTable::Lost& x : c.take_lost()) {
              lost.append(nb::make_tuple(x.group, x.ordinal, nb::tuple(nb::cast(x.tokens))));
            }
            return lost;
          },
          nb::sig("def take_lost(self) -> list[tuple[int, int, tuple[int, ...]]]"),
          "(group, ordinal, token ids) of each block that was lost since the last call, in order.")
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
  bind_table_changes(m, allocator);
}

}  // namespace kvmem
