// kvmem._core.BatchBuffers, and the calls that fill it.

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "allocator/allocator.h"
#include "bindings/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvmem {
namespace {

// The buffers of a batch, with the objects that own them, and what the last fill wrote.
struct Buffers {
  BatchBuffers at;
  BatchMarks marks;
  std::vector<nb::object> owners;
  BatchSizes sizes = {};
  bool filled = false;   // false before the first fill, and after one that failed
  bool filling = false;  // a thread fills them now
};

// Returns a size, which int32 counts must be able to reach.
i64 size_of(i64 size, const char* field) {
  if (size < 0) throw SpecError(std::string(field) + ": got " + std::to_string(size) + "; must be 0 or more");
  return to_int32(size, field);
}

// An array of a batch: where its address goes, by element type, and the least number of elements. Fields with both
// addresses accept either type.
struct Field {
  const char* name;
  i32* BatchBuffers::* narrow;
  i64* BatchBuffers::* wide;
  i64 (*least)(const BatchBuffers&);
};
using B = BatchBuffers;
constexpr auto kRows = [](const B& b) { return b.max_sequences; };
constexpr auto kSums = [](const B& b) { return b.max_sequences + 1; };
constexpr auto kTokens = [](const B& b) { return b.max_new_tokens; };
constexpr auto kDeltas = [](const B& b) { return b.max_deltas; };
constexpr Field kFields[] = {
    {"block_table", &B::block_table, nullptr, [](const B& b) { return b.max_sequences * b.max_blocks; }},
    {"seq_lens", &B::seq_lens, nullptr, kRows},
    {"first_tokens", &B::first_tokens, nullptr, kRows},
    {"slot_mapping", nullptr, &B::slot_mapping, kTokens},
    {"positions", &B::positions, nullptr, kTokens},
    {"batch_indices", &B::batch_indices, nullptr, kTokens},
    {"cu_seqlens_q", &B::cu_seqlens_q, nullptr, kSums},
    {"cu_seqlens_k", &B::cu_seqlens_k, &B::wide_seqlens_k, kSums},
    {"kv_indptr", &B::kv_indptr, nullptr, kSums},
    {"kv_indices", &B::kv_indices, nullptr, [](const B& b) { return b.max_indices; }},
    {"kv_last_page_len", &B::kv_last_page_len, nullptr, kRows},
    {"rows", &B::rows, nullptr, kRows},
    {"row_starts", &B::row_starts, &B::wide_starts, kSums},
    {"delta_places", nullptr, &B::delta_places, kDeltas},
    {"delta_blocks", &B::delta_blocks, nullptr, kDeltas},
};

// Returns the address of a contiguous writable CPU array, null for any other object. It is never converted, because a
// fill would write to the converted copy.
template <class T>
T* address_of(nb::handle given, i64 least) {
  Out<T> array;
  return nb::try_cast(given, array, false) && static_cast<i64>(array.shape(0)) >= least ? array.data() : nullptr;
}

void take(const Field& field, nb::handle given, Buffers* out) {
  const i64 least = field.least(out->at);
  Out<i64> array;
  const bool wide = field.wide && (!field.narrow || nb::try_cast(given, array, false));
  i64* const at_wide = wide ? address_of<i64>(given, least) : nullptr;
  i32* const at_narrow = wide ? nullptr : address_of<i32>(given, least);
  if (wide && at_wide) {
    out->at.*field.wide = at_wide;
  } else if (!wide && at_narrow) {
    out->at.*field.narrow = at_narrow;
  } else {
    throw SpecError(std::string(field.name) + ": needs a contiguous writable CPU array of at least " +
                    std::to_string(least) + (wide ? " int64" : " int32"));
  }
  out->owners.push_back(nb::borrow(given));
}

// Arrays that are missing or None are not filled.
void make_buffers(Buffers* self, i64 max_sequences, i64 max_new_tokens, i64 max_blocks, i64 max_indices,
                  const nb::kwargs& arrays) {
  BatchBuffers sizes;
  sizes.max_sequences = size_of(max_sequences, "max_sequences");
  sizes.max_new_tokens = size_of(max_new_tokens, "max_new_tokens");
  sizes.max_blocks = size_of(max_blocks, "max_blocks");
  sizes.max_indices = size_of(max_indices, "max_indices");
  const auto given = [&](const char* name) { return arrays.contains(name) && !arrays[name].is_none(); };
  if (given("delta_places") != given("delta_blocks")) throw SpecError("delta_places and delta_blocks: both or neither");
  if (given("delta_places")) sizes.max_deltas = static_cast<i64>(nb::len(nb::object(arrays["delta_places"])));
  Buffers made{sizes, BatchMarks(sizes), {}};
  for (const Field& field : kFields) {
    if (given(field.name)) take(field, arrays[field.name], &made);
  }
  new (self) Buffers(std::move(made));
}

std::vector<i32> handles_of(const Buffers& b) {
  std::vector<i32> handles;
  for (i64 i = 0; b.filled && i < b.marks.filled; ++i) {
    if (b.marks.rows[i].handle != RowMark::kNobody) handles.push_back(static_cast<i32>(b.marks.rows[i].handle));
  }
  return handles;
}

void bind_buffers(nb::module_& m) {
  nb::class_<Buffers>(m, "BatchBuffers")
      .def("__init__", &make_buffers, nb::kw_only(), "max_sequences"_a, "max_new_tokens"_a, "max_blocks"_a,
           "max_indices"_a, "arrays"_a,
           nb::sig("def __init__(self, *, max_sequences: int, max_new_tokens: int, max_blocks: int, max_indices: int, "
                   "**arrays: object) -> None"))
      .def_ro("filled", &Buffers::filled)
      .def("forget",
           [](Buffers& b) {
             if (!b.filling) b.marks.clear(), b.filled = false;
           })
      .def_prop_ro("handles", &handles_of)
      .def_prop_ro("num_rows", [](const Buffers& b) { return b.sizes.rows; })
      .def_prop_ro("num_new_tokens", [](const Buffers& b) { return b.sizes.new_tokens; })
      .def_prop_ro("num_indices", [](const Buffers& b) { return b.sizes.indices; })
      .def_prop_ro("max_seqlen_q", [](const Buffers& b) { return b.sizes.max_new_tokens; })
      .def_prop_ro("max_seqlen_k", [](const Buffers& b) { return b.sizes.max_tokens; })
      .def_prop_ro("num_deltas", [](const Buffers& b) { return b.sizes.deltas; })
      .def_prop_ro(
          "table_rows", [](const Buffers& b) { return nb::make_tuple(b.sizes.table_from, b.sizes.table_end); },
          nb::sig("def table_rows(self) -> tuple[int, int]"))
      .def_prop_ro("indices_from", [](const Buffers& b) { return b.sizes.indices_from; });
}

// Marks buffers as being filled for its own lifetime; throws SpecError if another thread fills them. The pool's lock
// does not guard them, because a batch may be filled through several pools. REQUIRES: Python's lock.
class Filling {
 public:
  explicit Filling(Buffers& out) : out_(out) {
    if (out.filling) {
      throw SpecError("batch: another thread is filling it at this moment; give each thread a batch of its own");
    }
    out.filling = true, out.filled = false;
  }
  ~Filling() { out_.filling = false; }
  Filling(const Filling&) = delete;
  Filling& operator=(const Filling&) = delete;

 private:
  Buffers& out_;
};

// The buffers of further groups, each with its group.
using Others = std::vector<std::pair<i64, Buffers*>>;

// Calls fill(groups, count) for the buffers of all groups, and stores what it wrote.
template <class Fill>
void refill(const Allocator& c, i64 group, Buffers& out, const std::optional<Others>& others, const Fill& fill) {
  const Filling filling(out);
  GroupBuffers one{c.groups().one(group), &out.at, &out.marks, {}};
  if (!others) {
    fill(&one, 1);
    out.sizes = one.sizes, out.filled = true;
    return;
  }
  std::vector<GroupBuffers> all{one};
  std::vector<std::unique_ptr<Filling>> rest;
  for (const auto& [g, buffers] : *others) {
    rest.push_back(std::make_unique<Filling>(*buffers));
    all.push_back({g, &buffers->at, &buffers->marks, {}});
  }
  fill(all.data(), static_cast<i64>(all.size()));
  out.sizes = all[0].sizes, out.filled = true;
  for (std::size_t k = 0; k < others->size(); ++k) {
    (*others)[k].second->sizes = all[k + 1].sizes, (*others)[k].second->filled = true;
  }
}

}  // namespace

// Throws StaleHandle if a sequence of the batch was freed or cut, or its tokens have moved. Called for each layer, so
// it is one comparison while nothing has changed.
void check_current(Allocator& c, i64 group, Buffers& batch) {
  if (batch.filled && c.changes() == batch.sizes.changes && !c.pool().is_poisoned()) return;
  if (!batch.filled) throw SpecError("batch: its last fill failed, or there was none; fill() it");
  const i64 stale = c.find_stale(group, batch.at, batch.marks, &batch.sizes);
  if (stale < 0) return;
  throw StaleHandle("batch: since it was filled, sequence handle " + std::to_string(stale) +
                    " was freed, or its tokens in the batch were cut off, got out of window or moved; fill() it again, "
                    "after the calls that change sequences and before those that use the batch");
}

// Throws SpecError for a sequence that is named twice: two rows would write its new tokens to the same slots.
void check_each_once(const Handles& handles) {
  constexpr i64 kBits = 4096;  // live handles are nearly consecutive, so two of them seldom share a bit
  std::uint64_t seen[kBits / 64] = {};
  bool again = false;
  for (i64 i = 0, n = handles.size(); i < n; ++i) {
    const i64 bit = handles.data()[i] & (kBits - 1);
    again = again || (seen[bit / 64] >> bit % 64 & 1) != 0;
    seen[bit / 64] |= std::uint64_t{1} << bit % 64;
  }
  if (!again) return;
  std::vector<i32> sorted(handles.data(), handles.data() + handles.size());
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice == sorted.end()) return;
  throw SpecError("sequences: handle " + std::to_string(*twice) +
                  " stands in the batch twice; name each sequence once, and fork() one that continues in two ways");
}

// Throws SpecError if there are fewer rows than sequences.
void check_rows(const Handles& handles, i64 rows) {
  if (rows < 0 || rows >= handles.size()) return;  // below 0: no padding
  throw SpecError("pad_to: got " + std::to_string(rows) + "; the batch has " + std::to_string(handles.size()) +
                  " sequences, and pads behind them: give " + std::to_string(handles.size()) +
                  " or more, or leave it out");
}

void fill(nb::handle_t<Allocator> self, nb::handle handles, nb::handle new_tokens, i64 group, i64 rows, Buffers& out,
          const std::optional<Others>& others) {
  auto& a = nb::cast<Allocator&>(self);
  const Handles ids("ids", handles, self);
  const Counts fresh("new_tokens", new_tokens, true);
  if (fresh) same_length(ids, fresh);
  check_each_once(ids);
  check_rows(ids, rows);
  refill(a, group, out, others,
         [&](GroupBuffers* groups, i64 count) { a.fill(ids.data(), ids.size(), fresh.data(), rows, groups, count); });
}

// `out`: for the first group that grows with the tokens.
void step_batch(nb::handle_t<Allocator> self, nb::handle handles, nb::handle counts, nb::handle tokens, i64 rows,
                Buffers& out, const std::optional<Others>& others) {
  auto& a = nb::cast<Allocator&>(self);
  const Handles ids("ids", handles, self);
  const Counts more("counts", counts, true);
  const TokenIds known(tokens, true);
  if (more) same_length(ids, more);
  check_rows(ids, rows);
  refill(a, -1, out, others, [&](GroupBuffers* groups, i64 count) {
    a.step(ids.data(), more.data(), ids.size(), known.data(), known.size(), rows, groups, count);
  });
}

void bind_batch(nb::module_& m, nb::class_<Allocator>& allocator) {
  bind_buffers(m);
  allocator.def_prop_ro("changes", &Allocator::changes)
      .def("check_current", &check_current, "group"_a, "batch"_a)
      .def("fill", &fill, "handles"_a.none(), "new_tokens"_a.none(), "group"_a, "rows"_a, "out"_a,
           "others"_a.none() = nb::none(),
           nb::sig("def fill(self, handles: object, new_tokens: object, group: int, rows: int, out: BatchBuffers, "
                   "others: list[tuple[int, BatchBuffers]] | None = None) -> None"))
      .def("step_batch", &step_batch, "handles"_a.none(), "counts"_a.none(), "tokens"_a.none(), "rows"_a, "out"_a,
           "others"_a.none() = nb::none(),
           nb::sig("def step_batch(self, handles: object, counts: object, tokens: object, rows: int, "
                   "out: BatchBuffers, others: list[tuple[int, BatchBuffers]] | None = None) -> None"));
}

}  // namespace kvmem
