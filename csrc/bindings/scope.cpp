// What a with-statement and the end of a Python object do to a sequence. Each is one C++ call, so that a signal handler
// which raises runs before or after it, not within.

#include <optional>
#include <string>

#include "allocator/allocator.h"
#include "bindings/bindings.h"

namespace nb = nanobind;

namespace kvmem {
namespace {

struct Scope {};

// Frees the sequence, unless the body of the with-statement has. If the body has raised, its exception is the one that
// the caller sees.
void leave_scope(nb::handle self, nb::handle kind, nb::handle, nb::handle) {
  auto& cache = nb::cast<Allocator&>(self.attr("_core"));
  const i32 handle = nb::cast<i32>(self.attr("_id"));
  const WithoutGil free;
  try {
    free_any(cache, &handle, 1);
  } catch (const StaleHandle&) {
  } catch (const std::exception&) {
    if (kind.is_none()) throw;
  }
}

// Returns what the object's repr() would, but runs no Python code, in which a signal handler could raise.
std::string text_of(nb::handle self, Allocator& cache, i32 handle) {
  std::string text = "Sequence(id=" + std::to_string(handle);
  const nb::object alloc = nb::getattr(self, "_alloc", nb::none());
  const nb::object labels = nb::getattr(alloc, "_labels", nb::none());
  if (PyDict_Check(labels.ptr())) {
    PyObject* const label = PyDict_GetItem(labels.ptr(), nb::int_(handle).ptr());
    if (label) text += std::string(", label=") + nb::repr(nb::handle(label)).c_str();
  }
  const Sequences::Lengths now = cache.lengths(handle, -1);
  return text + ", num_tokens=" + std::to_string(now.tokens) + ", committed=" + std::to_string(now.committed) + ")";
}

// Returns the text of a sequence that is live although its object ends. Returns nothing if it was freed, if the object
// does not own it, and in a forked child.
std::optional<std::string> unfreed(nb::handle self) {
  try {
    const nb::object core = nb::getattr(self, "_core", nb::none());
    i32 handle = 0;
    if (!nb::isinstance<Allocator>(core)) return {};
    if (!nb::try_cast(nb::getattr(self, "_id", nb::none()), handle, false)) return {};
    auto& cache = nb::cast<Allocator&>(core);
    if (!cache.is_live(handle) || nb::hasattr(self, "_lent")) return {};
    return text_of(self, cache, handle);
  } catch (const Error&) {  // another thread has freed it
  } catch (const nb::python_error&) {
  }
  return {};
}

// Warns of an object that ends while its sequence is live. The sequence stays, because its handle may be in use in a
// batch or a scheduler. This is no nanobind function: at exit Python may end a daemon thread by unwinding while the
// warning runs, and nanobind would catch that.
PyObject* end_of_object(PyObject*, PyObject* self) {
  const std::optional<std::string> text = unfreed(self);
  if (text && PyErr_ResourceWarning(
                  self, 1,
                  "unfreed %s: the object has no references any more, and its memory stays in use; free() it, use it "
                  "in a with-statement, or detach() it if its id stays in use",
                  text->c_str()) != 0) {
    PyErr_WriteUnraisable(self);  // a warnings filter has turned it into an error
  }
  Py_RETURN_NONE;
}

PyMethodDef end_method = {"__del__", end_of_object, METH_O, nullptr};

}  // namespace

void bind_scope(nb::module_& m) {
  nb::class_<Scope>(m, "Scope", "A base of a sequence's Python object, which has a ``_core`` and an ``_id``.")
      .def("__enter__", &nb::borrow<nb::object>, nb::sig("def __enter__(self) -> object"))
      .def("__exit__", &leave_scope, nb::arg().none(), nb::arg().none(), nb::arg().none(),
           nb::sig("def __exit__(self, kind: object, error: object, at: object, /) -> None"));
  m.attr("_end_of_object") = nb::steal(PyInstanceMethod_New(nb::steal(PyCFunction_New(&end_method, nullptr)).ptr()));
}

}  // namespace kvmem
