// What `with` and the end of a Python object do to a sequence, as one call each: a signal handler that raises comes
// before it, or after.

#include <string>

#include "bindings.h"
#include "cache.h"

namespace nb = nanobind;

namespace kvmem {
namespace {

struct Scope {};

// Its body may have freed it, and an exception of its body is what the caller shall see.
void leave_scope(nb::handle self, nb::handle kind, nb::handle, nb::handle) {
  auto& cache = nb::cast<Cache&>(self.attr("_core"));
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
std::string text_of(nb::handle self, Cache& cache, i32 handle) {
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

// Nobody has the object any more, and its sequence is live: a warning says so. The sequence stays, since its number may
// be in use: in a batch, with a scheduler. What was freed, and an object that only names another's sequence, go in
// silence. Python calls this between any two instructions; it waits for no lock with Python's in hand.
void end_of_object(nb::handle self) {
  const nb::object core = nb::getattr(self, "_core", nb::none());
  i32 handle = 0;
  if (!nb::isinstance<Cache>(core) || !nb::try_cast(nb::getattr(self, "_id", nb::none()), handle, false)) return;
  auto& cache = nb::cast<Cache&>(core);
  std::string text;
  try {
    if (!cache.is_live(handle) || nb::hasattr(self, "_lent")) return;
    text = text_of(self, cache, handle);
  } catch (const Error&) {  // another thread was faster; or it is a forked child's, and the parent has it
    return;
  }
  if (PyErr_ResourceWarning(self.ptr(), 1,
                            "unfreed %s: nobody has the object any more, and its memory stays taken; free() it, use it "
                            "in a with-statement, or detach() it where its id goes on",
                            text.c_str()) != 0) {
    PyErr_WriteUnraisable(self.ptr());  // a filter makes errors of warnings
  }
}

}  // namespace

void bind_scope(nb::module_& m) {
  nb::class_<Scope>(m, "Scope",
                    "What a sequence's Python object does at the ends of its life: it has a ``_core`` and an ``_id``.")
      .def(
          "__enter__", [](nb::handle self) { return nb::borrow(self); }, nb::sig("def __enter__(self) -> object"))
      .def("__exit__", &leave_scope, nb::arg().none(), nb::arg().none(), nb::arg().none(),
           nb::sig("def __exit__(self, kind: object, error: object, at: object, /) -> None"))
      .def("__del__", &end_of_object, nb::sig("def __del__(self) -> None"));
}

}  // namespace kvmem
