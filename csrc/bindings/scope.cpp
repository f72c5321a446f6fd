// What `with` and the end of a Python object do to a sequence, as one call each: a signal handler that raises comes
// before it, or after.

#include <optional>
#include <string>

#include "allocator/allocator.h"
#include "bindings/bindings.h"

namespace nb = nanobind;

namespace kvmem {
namespace {

struct Scope {};

// Its body may have freed it, and an exception of its body is what the caller shall see.
void leave_scope(nb::handle self, nb::handle kind, nb::handle, nb::handle) {
  auto& cache = nb::cast<Allocator&>(self.attr("_core"));
  const i32 handle = nb::cast<i32>(self.attr("_id"));
  const WithoutGil free;
  try {
    cache.free(&handle, 1);
  } catch (const StaleHandle&) {
  } catch (const std::exception&) {
    if (kind.is_none()) throw;
  }
}

// As the object's repr(), made without any code of Python's: a signal handler could raise in it.
std::string text_of(nb::handle self, Allocator& cache, i32 handle) {
  std::string text = "Sequence(id=" + std::to_string(handle);
  const nb::object alloc = nb::getattr(self, "_alloc", nb::none());
  const nb::object labels = nb::getattr(alloc, "_labels", nb::none());
  if (PyDict_Check(labels.ptr())) {
    PyObject* const label = PyDict_GetItem(labels.ptr(), nb::int_(handle).ptr());
    if (label) text += std::string(", label=") + nb::repr(nb::handle(label)).c_str();
  }
  return text + ", num_tokens=" + std::to_string(cache.tokens(handle, -1)) +
         ", committed=" + std::to_string(cache.committed(handle, -1)) + ")";
}

// What is to be said of the object's sequence: nothing where it was freed, where the object only names another's, or
// where it is a forked child's, whose parent has it.
std::optional<std::string> forgotten(nb::handle self) {
  try {
    const nb::object core = nb::getattr(self, "_core", nb::none());
    i32 handle = 0;
    if (!nb::isinstance<Allocator>(core) || !nb::try_cast(nb::getattr(self, "_id", nb::none()), handle, false))
      return {};
    auto& cache = nb::cast<Allocator&>(core);
    if (!cache.is_live(handle) || nb::hasattr(self, "_lent")) return {};
    return text_of(self, cache, handle);
  } catch (const Error&) {  // another thread was faster
  } catch (const nb::python_error&) {
  }
  return {};
}

// Nobody has the object any more, and its sequence is live: a warning says so. The sequence stays, since its number may
// be in use: in a batch, with a scheduler. Python calls this between any two instructions. Not by way of nanobind: a
// daemon thread may be ended by Python, at exit, in the middle of what the warning runs, and nanobind catches that.
PyObject* end_of_object(PyObject*, PyObject* self) {
  const std::optional<std::string> text = forgotten(self);
  if (text && PyErr_ResourceWarning(
                  self, 1,
                  "unfreed %s: nobody has the object any more, and its memory stays taken; free() it, use it in a "
                  "with-statement, or detach() it where its id goes on",
                  text->c_str()) != 0) {
    PyErr_WriteUnraisable(self);  // a filter makes errors of warnings
  }
  Py_RETURN_NONE;
}

PyMethodDef end_method = {"__del__", end_of_object, METH_O, nullptr};

}  // namespace

void bind_scope(nb::module_& m) {
  nb::class_<Scope>(m, "Scope",
                    "What a sequence's Python object does at the ends of its life: it has a ``_core`` and an ``_id``.")
      .def(
          "__enter__", [](nb::handle self) { return nb::borrow(self); }, nb::sig("def __enter__(self) -> object"))
      .def("__exit__", &leave_scope, nb::arg().none(), nb::arg().none(), nb::arg().none(),
           nb::sig("def __exit__(self, kind: object, error: object, at: object, /) -> None"));
  m.attr("_end_of_object") = nb::steal(PyInstanceMethod_New(nb::steal(PyCFunction_New(&end_method, nullptr)).ptr()));
}

}  // namespace kvmem
