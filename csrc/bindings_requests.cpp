// The part of kvmem._core.Cache that kvmem/scheduler.py is made of. Called for every request in every step, so these
// take no keywords, which nanobind would look for, and look at their arguments themselves.

#include <nanobind/ndarray.h>

#include <cstring>
#include <vector>

#include "bindings.h"
#include "cache.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvmem {
namespace {

// int32 [3][k]: rows, columns, blocks; None for k = 0. A bytearray, since what numpy makes of bytes is read-only.
nb::object to_python(const TableWrites& writes) {
  if (writes.empty()) return nb::none();
  const std::size_t k = writes.size();
  nb::object out = nb::steal(PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(3 * k * sizeof(i32))));
  if (!out.is_valid()) throw nb::python_error();
  i32* to = reinterpret_cast<i32*>(PyByteArray_AS_STRING(out.ptr()));
  for (std::size_t i = 0; i < k; ++i) {
    to[i] = writes[i].row, to[k + i] = writes[i].column, to[2 * k + i] = writes[i].block;
  }
  return out;
}

// An int that is an int32, and no bool.
bool read_int(nb::handle given, i32* value) {
  if (!PyLong_CheckExact(given.ptr())) return false;
  int overflow = 0;
  const i64 wide = PyLong_AsLongLongAndOverflow(given.ptr(), &overflow);
  if (overflow != 0 || wide < INT32_MIN || wide > INT32_MAX) return false;
  *value = static_cast<i32>(wide);
  return true;
}

// An int32 array, held while this lives; good() says whether it is one. With nanobind's array a call takes 40 % longer.
class Int32s {
 public:
  explicit Int32s(nb::handle given) {
    if (PyObject_GetBuffer(given.ptr(), &buffer_, PyBUF_ND | PyBUF_FORMAT) != 0) PyErr_Clear();
  }
  ~Int32s() { PyBuffer_Release(&buffer_); }
  Int32s(const Int32s&) = delete;
  Int32s& operator=(const Int32s&) = delete;

  bool good() const { return buffer_.obj && buffer_.ndim == 1 && std::strcmp(buffer_.format, "i") == 0; }
  const i32* data() const { return static_cast<const i32*>(buffer_.buf); }
  std::size_t size() const { return static_cast<std::size_t>(buffer_.shape[0]); }

 private:
  Py_buffer buffer_ = {};
};

// False for what is no list of token ids.
bool read_list(nb::handle given, std::vector<i32>* ids) {
  if (!PyList_CheckExact(given.ptr())) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(given.ptr()); ++i) {
    i32 id = 0;
    if (!read_int(PyList_GET_ITEM(given.ptr(), i), &id) || id < 0) return false;
    ids->push_back(id);
  }
  return true;
}

nb::object publish_ids(Cache& c, i32 handle, const i32* ids, std::size_t size) {
  const i32 count = static_cast<i32>(size);
  if (c.commit_at_hand(handle, count, ids)) return nb::none();
  TableWrites written;
  {
    nb::gil_scoped_release release;
    written = c.commit_telling(&handle, &count, 1, ids);
  }
  return to_python(written);
}

nb::object grow(Cache& c, i32 handle, nb::handle count) {
  i32 more = 0;
  if (!read_int(count, &more)) throw nb::next_overload();
  if (c.extend_at_hand(handle, more, true)) return nb::none();  // letting Python's lock go would cost more
  TableWrites written;
  {
    nb::gil_scoped_release release;
    written = c.extend_telling(&handle, &more, 1);
  }
  return to_python(written);
}

nb::object publish(Cache& c, i32 handle, nb::handle tokens) {
  if (i32 count = 0; read_int(tokens, &count) && count >= 0) {
    if (c.commit_at_hand(handle, count)) return nb::none();
    nb::gil_scoped_release release;
    c.commit(&handle, &count, 1, -1, nullptr);
    return nb::none();
  }
  if (std::vector<i32> ids; read_list(tokens, &ids)) return publish_ids(c, handle, ids.data(), ids.size());
  const Int32s ids(tokens);
  if (!ids.good()) throw nb::next_overload();  // a TypeError, since there is none
  check_ids(ids.data(), ids.size());
  return publish_ids(c, handle, ids.data(), ids.size());
}

nb::object grow_batch(Cache& c, In<i32> handles, In<i32> counts) {
  same_length(handles, counts);
  TableWrites written;
  {
    nb::gil_scoped_release release;
    written = c.extend_telling(handles.data(), counts.data(), static_cast<i64>(handles.shape(0)));
  }
  return to_python(written);
}

nb::object publish_batch(Cache& c, In<i32> handles, In<i32> counts, In<i32> tokens) {
  same_length(handles, counts);
  check_tokens(counts, tokens);
  check_ids(tokens);
  TableWrites written;
  {
    nb::gil_scoped_release release;
    written = c.commit_telling(handles.data(), counts.data(), static_cast<i64>(handles.shape(0)), tokens.data());
  }
  return to_python(written);
}

}  // namespace

void bind_requests(nb::class_<Cache>& cache) {
  cache
      .def("grow", &grow, nb::sig("def grow(self, handle: int, count: int, /) -> bytearray | None"),
           "extend() that tells which table entries it wrote: int32 [3][k], rows, columns and blocks; None for none.")
      .def("publish", &publish,
           nb::sig(
               "def publish(self, handle: int, tokens: int | list[int] | NDArray[numpy.int32], /) -> bytearray | None"),
           "commit() or commit_tokens(), told like this. TypeError for tokens of another type, or a count below 0.")
      .def("grow_batch", &grow_batch, "handles"_a.noconvert(), "counts"_a.noconvert(),
           nb::sig("def grow_batch(self, handles: NDArray[numpy.int32], counts: NDArray[numpy.int32]) "
                   "-> bytearray | None"))
      .def("publish_batch", &publish_batch, "handles"_a.noconvert(), "counts"_a.noconvert(), "tokens"_a.noconvert(),
           nb::sig("def publish_batch(self, handles: NDArray[numpy.int32], counts: NDArray[numpy.int32], "
                   "tokens: NDArray[numpy.int32]) -> bytearray | None"))
      .def(
          "table", [](Cache& c, i64 handle, i64 group) { return to_python(c.table(handle, group)); }, "handle"_a,
          "group"_a, nb::sig("def table(self, handle: int, group: int) -> bytearray | None"),
          "All entries of one table; those that a window has dropped are 0.");
}

}  // namespace kvmem
