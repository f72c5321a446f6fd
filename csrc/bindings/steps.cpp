// The verbs of sequences: extend, commit, step and free, for one sequence and for several. With `tell`, a call returns
// what it wrote to block tables: TableChanges, or None if it wrote nothing.
//
// The core releases Python's lock if a call has to decide something (allocator.h), so nothing here does.

#include <nanobind/nanobind.h>

#include <vector>

#include "allocator/allocator.h"
#include "bindings/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvmem {
namespace {

template <class Verb>
nb::object changes_of(bool tell, const Verb& verb) {
  if (!tell) return verb(nullptr), nb::none();
  TableChanges changes;
  verb(&changes);
  return to_python(std::move(changes));
}

// The names of arguments in errors depend on the caller: `tell` is set by SchedulerCache, whose arguments have other
// names.
nb::object extend(Allocator& a, i32 handle, nb::handle count, i64 group, bool tell) {
  const i32 more = to_count(tell ? "count" : "n", count);
  return changes_of(tell, [&](TableChanges* changes) { a.extend(handle, more, group, changes); });
}

nb::object commit(Allocator& a, i32 handle, nb::handle count, i64 group, nb::handle tokens, bool tell) {
  if (!count.is_none()) {
    const i32 known = to_count("count", count);
    return changes_of(tell, [&](TableChanges* changes) { a.commit(handle, known, group, nullptr, changes); });
  }
  const TokenIds ids(tokens, tell ? "publish" : "commit");
  return changes_of(tell, [&](TableChanges* changes) { a.commit(handle, ids.size(), group, ids.data(), changes); });
}

nb::object step(Allocator& a, i32 handle, nb::handle count, nb::handle tokens, bool tell) {
  const i32 more = to_count(tell ? "count" : "n", count);
  const TokenIds ids(tokens, true);
  return changes_of(tell, [&](TableChanges* changes) { a.step(handle, more, ids.data(), ids.size(), changes); });
}

nb::object extend_batch(nb::handle_t<Allocator> self, nb::handle handles, nb::handle counts, i64 group, bool tell) {
  auto& a = nb::cast<Allocator&>(self);
  const Handles ids(tell ? "handles" : "ids", handles, self);
  const Counts more("counts", counts);
  same_length(ids, more);
  return changes_of(tell,
                    [&](TableChanges* changes) { a.extend(ids.data(), more.data(), ids.size(), group, changes); });
}

nb::object commit_batch(nb::handle_t<Allocator> self, nb::handle handles, nb::handle counts, i64 group,
                        nb::handle tokens, bool tell) {
  auto& a = nb::cast<Allocator&>(self);
  const Handles ids(tell ? "handles" : "ids", handles, self);
  const Counts more("counts", counts);
  const TokenIds known(tokens, true);
  same_length(ids, more);
  if (known) check_tokens(more, known);
  return changes_of(tell, [&](TableChanges* changes) {
    a.commit(ids.data(), more.data(), ids.size(), group, known.data(), changes);
  });
}

}  // namespace

void bind_steps(nb::class_<Allocator>& allocator) {
  allocator
      .def("extend", &extend, "handle"_a, "count"_a.none(), "group"_a = -1, "tell"_a = false,
           nb::sig("def extend(self, handle: int, count: int, group: int = -1, tell: bool = False) "
                   "-> TableChanges | None"))
      .def("extend_batch", &extend_batch, "handles"_a.none(), "counts"_a.none(), "group"_a = -1, "tell"_a = false,
           nb::sig("def extend_batch(self, handles: object, counts: object, group: int = -1, tell: bool = False) "
                   "-> TableChanges | None"))
      .def("commit", &commit, "handle"_a, "count"_a.none(), "group"_a = -1, "tokens"_a.none() = nb::none(),
           "tell"_a = false,
           nb::sig("def commit(self, handle: int, count: int | None, group: int = -1, tokens: object = None, "
                   "tell: bool = False) -> TableChanges | None"))
      .def("commit_batch", &commit_batch, "handles"_a.none(), "counts"_a.none(), "group"_a = -1,
           "tokens"_a.none() = nb::none(), "tell"_a = false,
           nb::sig("def commit_batch(self, handles: object, counts: object, group: int = -1, tokens: object = None, "
                   "tell: bool = False) -> TableChanges | None"))
      .def("step", &step, "handle"_a, "count"_a.none(), "tokens"_a.none() = nb::none(), "tell"_a = false,
           nb::sig("def step(self, handle: int, count: int, tokens: object = None, tell: bool = False) "
                   "-> TableChanges | None"))
      .def(
          "free", [](Allocator& a, i32 handle) { free_any(a, &handle, 1); }, "handle"_a)
      .def(
          "free_batch",
          [](nb::handle_t<Allocator> self, nb::handle handles) {
            const Handles ids("ids", handles, self);
            free_any(nb::cast<Allocator&>(self), ids.data(), ids.size());
          },
          "handles"_a.none(), nb::sig("def free_batch(self, handles: object) -> None"));
}

}  // namespace kvmem
