// kvmem._core.PagePool, Cache and what they take.

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
      .def_prop_ro("budget_pages", [](PagePool& p) { return p.lock(true), p.budget_pages(); })
      .def_prop_ro("present_pages", [](PagePool& p) { return p.lock(true), p.present_pages(); })
      .def_prop_ro("mapped_pages", [](PagePool& p) { return p.lock(true), p.mapped_pages(); })
      .def_prop_ro("driver_calls", [](PagePool& p) { return p.lock(true), p.driver_calls(); })
      .def("driver_counters", [](PagePool& p) { return p.lock(true), p.driver_counters(); })
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
  nb::class_<CacheStats>(m, "CacheStats")
      .def_ro("budget_bytes", &CacheStats::budget_bytes)
      .def_ro("created_bytes", &CacheStats::created_bytes)
      .def_ro("free_bytes", &CacheStats::free_bytes)
      .def_ro("mapped_bytes", &CacheStats::mapped_bytes)
      .def_ro("used_bytes", &CacheStats::used_bytes)
      .def_ro("parked_bytes", &CacheStats::parked_bytes)
      .def_ro("held_bytes", &CacheStats::held_bytes)
      .def_ro("limit_bytes", &CacheStats::limit_bytes)
      .def_ro("cached_beside_bytes", &CacheStats::cached_beside_bytes)
      .def_ro("shared_bytes", &CacheStats::shared_bytes)
      .def_ro("num_sequences", &CacheStats::num_sequences)
      .def_ro("driver_calls", &CacheStats::driver_calls)
      .def_ro("physical_bytes", &CacheStats::physical_bytes)
      .def_ro("cached_bytes", &CacheStats::cached_bytes)
      .def_ro("cached_blocks", &CacheStats::cached_blocks)
      .def_ro("pinned_blocks", &CacheStats::pinned_blocks)
      .def_ro("evicted_blocks", &CacheStats::evicted_blocks)
      .def_ro("lookup_tokens", &CacheStats::lookup_tokens)
      .def_ro("hit_tokens", &CacheStats::hit_tokens);
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
nb::ndarray<std::uint8_t> arena_bytes(nb::handle_t<Cache> self, i64 group, i64 arena_in_group, i64 begin, i64 bytes) {
  auto& cache = nb::cast<Cache&>(self);
  cache.check_process();
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

nb::class_<Cache> bind_cache(nb::module_& m) {
  return nb::class_<Cache>(m, "Cache", "Sequences over one of the two page tables; kvmem.Allocator is its public face.")
      .def(
          "__init__",
          [](Cache* self, const Geometry& geometry, std::shared_ptr<PagePool> pool, bool paged, i64 limit_pages,
             bool owns_pool, const PrefixOptions& prefix) {
            new (self) Cache(geometry, std::move(pool), paged, limit_pages, owns_pool, prefix);
          },
          nb::kw_only(), "geometry"_a, "pool"_a, "paged"_a, "limit_pages"_a, "owns_pool"_a, "prefix"_a, Free())
      .def(
          "open",
          [](Cache& c) {
            i32 handle = 0;
            c.open(1, &handle);
            return handle;
          },
          Free())
      .def(
          "open_batch",
          [](Cache& c, const WritableInt32s& handles) {
            std::vector<i32> opened(handles.size());
            {
              nb::gil_scoped_release release;
              c.open(handles.size(), opened.data());
            }
            handles.write(opened.data(), handles.size());
          },
          "handles"_a.noconvert())
      .def(
          "extend",
          [](Cache& c, i32 handle, i64 count, i64 group) {
            if (group < 0 && c.extend_at_hand(handle, count)) return;  // letting Python's lock go would cost more
            const WithoutGil free;
            const i32 small = to_int32(count, "count");
            c.extend(&handle, &small, 1, group);
          },
          "handle"_a, "count"_a, "group"_a = -1)
      .def(
          "advance",
          [](Cache& c, i32 handle, i32 count, const std::optional<TokenIds>& tokens) {
            if (tokens) check_ids(*tokens);
            const i32* ids = tokens ? tokens->data() : nullptr;
            const i64 num_ids = tokens ? tokens->size() : 0;
            if (c.advance_at_hand(handle, count, ids, num_ids)) return;
            const WithoutGil free;
            c.advance(handle, count, ids, num_ids);
          },
          "handle"_a, "count"_a, "tokens"_a.noconvert().none() = nb::none(),
          "Commits what was reserved, and makes room for count more tokens.")
      .def(
          "extend_batch",
          [](Cache& c, const Int32s& handles, const Int32s& counts, i64 group) {
            same_length(handles, counts);
            c.extend(handles.data(), counts.data(), handles.size(), group);
          },
          "handles"_a.noconvert(), "counts"_a.noconvert(), "group"_a = -1, Free())
      .def(
          "commit",
          [](Cache& c, i32 handle, i64 count, i64 group) {
            if (group < 0 && c.commit_at_hand(handle, count)) return;
            const WithoutGil free;
            const i32 small = to_int32(count, "count");
            c.commit(&handle, &small, 1, group, nullptr);
          },
          "handle"_a, "count"_a, "group"_a = -1)
      .def(
          "commit_batch",
          [](Cache& c, const Int32s& handles, const Int32s& counts, i64 group) {
            same_length(handles, counts);
            c.commit(handles.data(), counts.data(), handles.size(), group, nullptr);
          },
          "handles"_a.noconvert(), "counts"_a.noconvert(), "group"_a = -1, Free())
      .def("truncate", &Cache::truncate, "handle"_a, "tokens"_a, Free())
      .def(
          "fork",
          [](Cache& c, i64 handle, nb::handle sequence) {
            i64 child = 0;
            {
              const WithoutGil free;
              child = c.fork(handle);
            }
            keep_in(sequence, "_id", child);
            return child;
          },
          "handle"_a, "sequence"_a = nb::none(), "The new handle; also told to the object that stands for it.")
      .def("first_arena", &Cache::first_arena, "group"_a, "Its number, as ops name it.")
      .def("check_process", &Cache::check_process, "DeviceError in a forked child.")
      .def("is_live", &Cache::is_live, "handle"_a)
      .def(
          "free", [](Cache& c, i32 handle) { c.free(&handle, 1); }, "handle"_a, Free())
      .def(
          "free_batch", [](Cache& c, const Int32s& handles) { c.free(handles.data(), handles.size()); },
          "handles"_a.noconvert(), Free())
      .def("tokens", &Cache::tokens, "handle"_a, "group"_a = -1)
      .def("committed", &Cache::committed, "handle"_a, "group"_a = -1)
      .def("first_token", &Cache::first_token, "handle"_a, "group"_a = -1)
      .def("close", &Cache::close, Free())
      .def("can_fit", &Cache::can_fit, "tokens"_a, Free())
      .def("age_seconds", &Cache::age_seconds, "handle"_a)
      .def(
          "lengths",
          [](Cache& c, const Int32s& handles, i64 group, Out<i64> tokens, Out<i64> committed) {
            const i64 room = static_cast<i64>(std::min(tokens.shape(0), committed.shape(0)));
            if (room < handles.size()) {
              throw SpecError("tokens and committed need an entry for each handle");
            }
            c.lengths(handles.data(), handles.size(), group, tokens.data(), committed.data());
          },
          "handles"_a.noconvert(), "group"_a, "tokens"_a.noconvert(), "committed"_a.noconvert())
      .def(
          "row", [](Cache& c, i64 handle, i64 group) { return c.place(handle, group).row; }, "handle"_a, "group"_a = -1)
      .def(
          "common_blocks",
          [](Cache& c, const Int32s& handles, i64 group, Out<i64> blocks) {
            const i64 n = handles.size();
            if (static_cast<i64>(blocks.shape(0)) < n - 1) {
              throw SpecError("blocks needs an entry for each pair of neighbours");
            }
            std::vector<i64> found(n);
            {
              nb::gil_scoped_release release;
              c.common_blocks(handles.data(), n, group, found.data());
            }
            std::copy_n(found.data(), std::max(n - 1, i64{0}), blocks.data());
          },
          "handles"_a.noconvert(), "group"_a, "blocks"_a.noconvert())
      .def(
          "cascade_order",
          [](Cache& c, const Int32s& handles, i64 group, Out<i64> order) {
            const i64 n = handles.size();
            if (static_cast<i64>(order.shape(0)) < n) throw SpecError("order needs an entry for each handle");
            std::vector<i64> found(n);
            {
              nb::gil_scoped_release release;
              c.cascade_order(handles.data(), n, group, found.data());
            }
            std::copy_n(found.data(), n, order.data());
          },
          "handles"_a.noconvert(), "group"_a, "order"_a.noconvert())
      .def("compact", &Cache::compact, "bytes"_a, Free())
      .def("trim", &Cache::trim, "bytes"_a, Free())
      .def("set_memory", &Cache::set_memory, "pages"_a, Free())
      .def("stats", &Cache::stats, Free())
      .def("check", &Cache::check, Free())
      .def("digest", &Cache::digest, Free(),
           "64 bits made of all that a later call could see, and how often a driver has failed when memory was written "
           "or in the mapper, or the eviction order has aged. A call that is refused leaves the first, unless the "
           "second has moved.")
      .def("record", &Cache::record, Free())
      .def("watch_lost", &Cache::watch_lost, Free(), "For tests: take_lost() says what leaves the cache from now on.")
      .def(
          "take_lost",
          [](Cache& c) {
            nb::list lost;
            for (const PageTable::Lost& x : c.take_lost()) {
              lost.append(nb::make_tuple(x.group, x.ordinal, nb::tuple(nb::cast(x.tokens))));
            }
            return lost;
          },
          nb::sig("def take_lost(self) -> list[tuple[int, int, tuple[int, ...]]]"),
          "(group, ordinal, token ids) of each block that was lost since the last call, in order.")
      .def(
          "take_ops", [](Cache& c) { return to_records(c.take_ops()); },
          nb::sig("def take_ops(self) -> list[tuple[str, int, int, int, int, int]]"))
      .def(
          "apply",
          [](Cache& c, const nb::sequence& records) {
            const std::vector<Op> ops = from_records(records);
            const WithoutGil free;
            c.apply(ops);
          },
          "ops"_a, nb::sig("def apply(self, ops: Sequence[Sequence[str | int]]) -> None"))
      .def("arena_bytes", &arena_bytes, "group"_a, "arena"_a, "begin"_a = 0, "bytes"_a = -1)
      .def("mapped_extent_bytes", &Cache::mapped_extent_bytes, "group"_a, "arena"_a, Free())
      .def("handles", &Cache::handles, Free());
}

}  // namespace

void bind_core(nb::module_& m) {
  bind_ops(m);
  bind_geometry(m);
  bind_pool(m);
  bind_stats(m);
  bind_sequences(m);
  bind_prefix_options(m);
  nb::class_<Cache> cache = bind_cache(m);
  bind_batch(m, cache);
  bind_prefix(cache);
  bind_requests(m, cache);
}

}  // namespace kvmem
