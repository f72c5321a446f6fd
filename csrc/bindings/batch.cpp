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

// The buffers of a batch, kept alive beside their addresses, and what the last fill wrote.
struct Buffers {
  BatchBuffers at;
  BatchMarks marks;
  std::vector<nb::object> owners;
  BatchSizes sizes = {};
  bool filled = false;
  bool filling = false;  // at this moment
};

// Of an array of int32 counts: the last of them must be one too.
i64 size_of(i64 size, const char* field) {
  if (size < 0) throw SpecError(std::string(field) + ": got " + std::to_string(size) + "; must be 0 or more");
  return to_int32(size, field);
}

template <class T>
T* take(std::vector<nb::object>& owners, const nb::object& owner, const char* name, i64 least) {
  if (owner.is_none()) return nullptr;
  Out<T> array;
  // convert = false: a copy would be written in place of the caller's array
  if (!nb::try_cast(owner, array, false) || static_cast<i64>(array.shape(0)) < least) {
    throw SpecError(std::string(name) + ": needs a contiguous writable CPU array of at least " + std::to_string(least) +
                    " " + (sizeof(T) == 8 ? "int64" : "int32"));
  }
  owners.push_back(owner);
  return array.data();
}

// Of the two, the one for the type of the array, if there is one.
void take_either(std::vector<nb::object>& owners, const nb::object& owner, const char* name, i64 least, i32** narrow,
                 i64** wide) {
  Out<i64> array;
  if (!owner.is_none() && nb::try_cast(owner, array, false)) {
    *wide = take<i64>(owners, owner, name, least);
  } else {
    *narrow = take<i32>(owners, owner, name, least);
  }
}

std::vector<i32> handles_of(const Buffers& b) {
  std::vector<i32> handles;
  for (i64 i = 0; b.filled && i < b.marks.filled; ++i) {
    if (b.marks.rows[i].handle != RowMark::kNobody) handles.push_back(static_cast<i32>(b.marks.rows[i].handle));
  }
  return handles;
}

void bind_buffers(nb::module_& m) {
  nb::class_<Buffers>(m, "BatchBuffers", "Where Allocator.fill() writes; one array per field of kvmem.Batch, or None.")
      .def(
          "__init__",
          [](Buffers* self, i64 max_sequences, i64 max_new_tokens, i64 max_blocks, i64 max_indices,
             nb::object block_table, nb::object seq_lens, nb::object first_tokens, nb::object slot_mapping,
             nb::object positions, nb::object batch_indices, nb::object cu_seqlens_q, nb::object cu_seqlens_k,
             nb::object kv_indptr, nb::object kv_indices, nb::object kv_last_page_len, nb::object rows,
             nb::object row_starts, nb::object delta_places, nb::object delta_blocks) {
            BatchBuffers at;
            std::vector<nb::object> owners;
            at.max_sequences = size_of(max_sequences, "max_sequences");
            at.max_new_tokens = size_of(max_new_tokens, "max_new_tokens");
            at.max_blocks = size_of(max_blocks, "max_blocks");
            at.max_indices = size_of(max_indices, "max_indices");
            const i64 n = max_sequences;
            at.block_table = take<i32>(owners, block_table, "block_table", n * max_blocks);
            at.seq_lens = take<i32>(owners, seq_lens, "seq_lens", n);
            at.first_tokens = take<i32>(owners, first_tokens, "first_tokens", n);
            at.slot_mapping = take<i64>(owners, slot_mapping, "slot_mapping", max_new_tokens);
            at.positions = take<i32>(owners, positions, "positions", max_new_tokens);
            at.batch_indices = take<i32>(owners, batch_indices, "batch_indices", max_new_tokens);
            at.cu_seqlens_q = take<i32>(owners, cu_seqlens_q, "cu_seqlens_q", n + 1);
            take_either(owners, cu_seqlens_k, "cu_seqlens_k", n + 1, &at.cu_seqlens_k, &at.wide_seqlens_k);
            at.kv_indptr = take<i32>(owners, kv_indptr, "kv_indptr", n + 1);
            at.kv_indices = take<i32>(owners, kv_indices, "kv_indices", max_indices);
            at.kv_last_page_len = take<i32>(owners, kv_last_page_len, "kv_last_page_len", n);
            at.rows = take<i32>(owners, rows, "rows", n);
            take_either(owners, row_starts, "row_starts", n + 1, &at.row_starts, &at.wide_starts);
            if (!delta_places.is_none()) {
              at.delta_places = take<i64>(owners, delta_places, "delta_places", 0);
              at.max_deltas = static_cast<i64>(nb::len(delta_places));
              at.delta_blocks = take<i32>(owners, delta_blocks, "delta_blocks", at.max_deltas);
              if (!at.delta_blocks) throw SpecError("delta_places and delta_blocks: both or neither");
            }
            new (self) Buffers{at, BatchMarks(at), std::move(owners)};
          },
          nb::kw_only(), "max_sequences"_a, "max_new_tokens"_a, "max_blocks"_a, "max_indices"_a,
          "block_table"_a.none() = nb::none(), "seq_lens"_a.none() = nb::none(), "first_tokens"_a.none() = nb::none(),
          "slot_mapping"_a.none() = nb::none(), "positions"_a.none() = nb::none(),
          "batch_indices"_a.none() = nb::none(), "cu_seqlens_q"_a.none() = nb::none(),
          "cu_seqlens_k"_a.none() = nb::none(), "kv_indptr"_a.none() = nb::none(), "kv_indices"_a.none() = nb::none(),
          "kv_last_page_len"_a.none() = nb::none(), "rows"_a.none() = nb::none(), "row_starts"_a.none() = nb::none(),
          "delta_places"_a.none() = nb::none(), "delta_blocks"_a.none() = nb::none())
      .def_prop_ro(
          "filled", [](const Buffers& b) { return b.filled; },
          "False before the first fill, and if the last one failed.")
      .def(
          "forget",
          [](Buffers& b) {
            if (!b.filling) b.marks.clear(), b.filled = false;
          },
          "What it was filled with is not where it should be: the next fill writes, and tells, all of it.")
      .def_prop_ro("handles", &handles_of, "The sequences of the last fill, without padding rows.")
      .def_prop_ro("num_rows", [](const Buffers& b) { return b.sizes.rows; })
      .def_prop_ro("num_new_tokens", [](const Buffers& b) { return b.sizes.new_tokens; })
      .def_prop_ro("num_indices", [](const Buffers& b) { return b.sizes.indices; })
      .def_prop_ro("max_seqlen_q", [](const Buffers& b) { return b.sizes.max_new_tokens; })
      .def_prop_ro("max_seqlen_k", [](const Buffers& b) { return b.sizes.max_tokens; })
      .def_prop_ro(
          "num_deltas", [](const Buffers& b) { return b.sizes.deltas; },
          "Entries of the table that changed; -1: more than were noted.")
      .def_prop_ro(
          "table_rows", [](const Buffers& b) { return nb::make_tuple(b.sizes.table_from, b.sizes.table_end); },
          nb::sig("def table_rows(self) -> tuple[int, int]"), "The rows that hold them, as a range.")
      .def_prop_ro(
          "indices_from", [](const Buffers& b) { return b.sizes.indices_from; }, "Where kv_indices changed first.");
}

// Of a batch that several threads fill one is served: the pool's lock does not guard its buffers, since a batch may be
// filled through one pool, then through another. All but the filling itself is done under Python's lock.
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

// The buffers of further groups, by these.
using Others = std::vector<std::pair<i64, Buffers*>>;

template <class Fill>
void refill(const Allocator& c, i64 group, Buffers& out, const std::optional<Others>& others, const Fill& fill) {
  const Filling filling(out);
  GroupBuffers one{group < 0 ? c.groups().token_group() : group, &out.at, &out.marks, {}};
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

// Called for each layer: one comparison while nothing has changed.
void check_current(Allocator& c, i64 group, Buffers& batch) {
  if (batch.filled && c.changes() == batch.sizes.changes && !c.pool().is_poisoned()) return;
  if (!batch.filled) throw SpecError("batch: its last fill failed, or there was none; fill() it");
  const i64 stale = c.find_stale(group, batch.at, batch.marks, &batch.sizes);
  if (stale < 0) return;
  throw StaleHandle("batch: since it was filled, sequence handle " + std::to_string(stale) +
                    " was freed, or tokens that the batch has of it were cut off, passed by a window or moved; " +
                    "fill() it again, after what changes sequences and before what uses it");
}

// A sequence that stands in a batch twice would have its new tokens written twice, to the same places.
void check_each_once(const Handles& handles) {
  constexpr i64 kBits = 4096;  // handles are numbers in a row: where there are fewer, two seldom share a bit
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
  throw SpecError(
      "sequences: handle " + std::to_string(*twice) +
      " stands in the batch twice; name each sequence once, and fork() one that is to be continued in two ways");
}

// A batch has a row for each sequence at least.
void check_rows(const Handles& handles, i64 rows) {
  if (rows < 0 || rows >= handles.size()) return;  // below 0: nobody asked
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
  allocator
      .def("check_current", &check_current, "group"_a, "batch"_a,
           "StaleHandle if the tokens of the batch no longer lie where it says.")
      .def("fill", &fill, "handles"_a.none(), "new_tokens"_a.none(), "group"_a, "rows"_a, "out"_a,
           "others"_a.none() = nb::none(),
           nb::sig("def fill(self, handles: object, new_tokens: object, group: int, rows: int, out: BatchBuffers, "
                   "others: list[tuple[int, BatchBuffers]] | None = None) -> None"),
           "Fills `out` for a group, and others for theirs.")
      .def("step_batch", &step_batch, "handles"_a.none(), "counts"_a.none(), "tokens"_a.none(), "rows"_a, "out"_a,
           "others"_a.none() = nb::none(),
           nb::sig("def step_batch(self, handles: object, counts: object, tokens: object, rows: int, "
                   "out: BatchBuffers, others: list[tuple[int, BatchBuffers]] | None = None) -> None"),
           "counts None: one token each. `out`: of the first group that grows with the tokens; others: of other "
           "groups.");
}

}  // namespace kvmem
