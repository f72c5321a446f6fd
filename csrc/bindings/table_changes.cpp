// kvmem.TableChanges, and the calls of kvmem._core.Allocator that read tables. A scheduler calls them for every request
// in every step, so they take no keywords, which nanobind would have to look up.

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "allocator/allocator.h"
#include "bindings/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvmem {
namespace {

// Calls f(write) for each write of the main group, which rows, columns, blocks and write() are about.
template <class F>
void each_main(const TableChanges& changes, F f) {
  for (const TableWrite& w : changes.writes) {
    if (w.group == changes.main) f(w);
  }
}

// A type slot, because it is faster than a method, and a scheduler tests every answer for being empty.
Py_ssize_t length_of(PyObject* self) {
  if (!nb::inst_ready(self)) {  // an object of __new__() without __init__()
    PyErr_SetString(PyExc_TypeError, "this TableChanges was never initialised");
    return -1;
  }
  return static_cast<Py_ssize_t>(nb::inst_ptr<TableChanges>(self)->writes.size());
}

PyType_Slot changes_slots[] = {{Py_sq_length, reinterpret_cast<void*>(&length_of)}, {0, nullptr}};

using Column = nb::ndarray<nb::numpy, i32, nb::ndim<1>>;

template <i32 TableWrite::* kField>
Column column_of(const TableChanges& changes) {
  std::size_t n = 0;
  i32* values = new i32[changes.writes.size()];
  const nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<i32*>(p); });
  each_main(changes, [&](const TableWrite& w) { values[n++] = w.*kField; });
  return Column(values, {n}, owner);
}

// Holds a writable int32 [rows, columns] of any strides.
class Table {
 public:
  explicit Table(nb::handle given) {
    const int wanted = PyBUF_STRIDES | PyBUF_FORMAT | PyBUF_WRITABLE;
    const bool held = PyObject_GetBuffer(given.ptr(), &buffer_, wanted) == 0;
    if (!held) PyErr_Clear();
    if (!held || buffer_.ndim != 2 || !is_int32(buffer_)) {
      PyBuffer_Release(&buffer_);
      throw SpecError("table: must be a writable int32 [requests, blocks] array on the CPU (numpy)");
    }
  }
  ~Table() { PyBuffer_Release(&buffer_); }
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;

  bool has(i64 row, i64 column) const {
    return row >= 0 && row < buffer_.shape[0] && column >= 0 && column < buffer_.shape[1];
  }
  void set(i64 row, i64 column, i32 block) {
    char* at = static_cast<char*>(buffer_.buf) + row * buffer_.strides[0] + column * buffer_.strides[1];
    *reinterpret_cast<i32*>(at) = block;
  }
  std::string shape() const { return std::to_string(buffer_.shape[0]) + ", " + std::to_string(buffer_.shape[1]); }

 private:
  Py_buffer buffer_ = {};
};

void write_changes(const TableChanges& changes, nb::handle given, i64 row) {
  if (changes.writes.empty()) return;
  Table table(given);
  each_main(changes, [&](const TableWrite& w) {
    if (table.has(row + w.row, w.column)) return;
    throw SpecError("table: entry [" + std::to_string(row + w.row) + ", " + std::to_string(w.column) +
                    "] was written, which a table of [" + table.shape() + "] does not have; nothing was copied to it");
  });
  each_main(changes, [&](const TableWrite& w) { table.set(row + w.row, w.column, w.block); });
}

TableChanges of_group(const TableChanges& changes, i32 group) {
  if (group < 0) throw SpecError("group: got " + std::to_string(group) + "; must be the index of a group, 0 or more");
  TableChanges found{{}, group};
  for (const TableWrite& w : changes.writes) {
    if (w.group == group) found.writes.push_back(w);
  }
  return found;
}

nb::tuple groups_of(const TableChanges& changes) {
  nb::list groups;
  i32 last = -1;
  for (const TableWrite& w : changes.writes) {  // by group
    if (w.group != last) groups.append(last = w.group);
  }
  return nb::tuple(groups);
}

using State = std::pair<i32, nb::bytes>;

State packed(const TableChanges& changes) {
  return {changes.main, nb::bytes(changes.writes.data(), changes.writes.size() * sizeof(TableWrite))};
}

void unpack(TableChanges& changes, const State& state) {
  const nb::bytes& bytes = state.second;
  if (bytes.size() % sizeof(TableWrite) != 0) throw SpecError("TableChanges: a broken pickle");
  std::vector<TableWrite> writes(bytes.size() / sizeof(TableWrite));
  std::copy_n(static_cast<const char*>(bytes.data()), bytes.size(), reinterpret_cast<char*>(writes.data()));
  new (&changes) TableChanges{std::move(writes), state.first};
}

std::string text_of(const TableChanges& changes) {
  std::string text = "TableChanges(";
  for (const TableWrite& w : changes.writes) {
    if (&w != changes.writes.data()) text += ", ";
    if (w.group != changes.main) text += "group " + std::to_string(w.group) + " ";
    text += "[" + std::to_string(w.row) + ", " + std::to_string(w.column) + "]: " + std::to_string(w.block);
  }
  return text + ")";
}

void bind_changes(nb::module_& m) {
  nb::class_<TableChanges>(
      m, "TableChanges", nb::type_slots(changes_slots),
      "What a call wrote to block tables: entry ``columns[k]`` of row ``rows[k]`` is now ``blocks[k]``, by row, then "
      "by "
      "column; 0 for a block that is out of window. These are the entries of the main group, the first that grows with "
      "the tokens; ``group(g)`` returns those of group g. The length counts the entries of all groups: most changes "
      "are "
      "empty, and false.")
      .def(nb::init<>())
      .def_prop_ro("rows", &column_of<&TableWrite::row>, nb::rv_policy::automatic,
                   "int32 [k]: positions in the ``handles`` of the call; 0 if it had one request. Cost: a copy.")
      .def_prop_ro("columns", &column_of<&TableWrite::column>, nb::rv_policy::automatic, "int32 [k].")
      .def_prop_ro("blocks", &column_of<&TableWrite::block>, nb::rv_policy::automatic, "int32 [k].")
      .def_prop_ro("groups", &groups_of, nb::sig("def groups(self) -> tuple[int, ...]"),
                   "The groups that have entries, ascending.")
      .def("group", &of_group, "group"_a,
           "Returns what was written to the tables of one group, as ``TableChanges`` with that main group.")
      .def("write", &write_changes, "table"_a.none(), "row"_a = 0,
           nb::sig("def write(self, table: NDArray[numpy.int32], row: int = 0) -> None"),
           "Writes the entries of the main group to a copy of its tables. Raises ``SpecError``, and writes nothing, if "
           "the copy is too small.\n\n"
           "table: int32 [requests, blocks of the longest], of any strides. row: the row of the copy that is row 0 "
           "here.")
      .def("__repr__", &text_of)
      .def("__getstate__", &packed)
      .def("__setstate__", &unpack);
}

}  // namespace

nb::object to_python(TableChanges changes) {
  return changes.writes.empty() ? nb::none() : nb::cast(std::move(changes));
}

void bind_table_changes(nb::module_& m, nb::class_<Allocator>& allocator) {
  bind_changes(m);
  allocator
      .def(
          "table", [](Allocator& a, i64 handle, i64 group) { return to_python(a.table(handle, group)); },
          nb::sig("def table(self, handle: int, group: int, /) -> TableChanges | None"))
      .def(
          "tables",
          [](nb::handle_t<Allocator> self, nb::handle handles) {
            const Handles ids("handles", handles, self);
            return to_python(nb::cast<Allocator&>(self).tables(ids.data(), ids.size()));
          },
          nb::sig("def tables(self, handles: object, /) -> TableChanges | None"));
}

}  // namespace kvmem
