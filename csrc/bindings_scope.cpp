// What `with` does to a sequence, as one call each: a signal handler that raises comes before it, or after.

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
  } catch (const Error&) {
    if (kind.is_none()) throw;
  }
}

}  // namespace

void bind_scope(nb::module_& m) {
  nb::class_<Scope>(m, "Scope", "The two methods that make a context manager of what has a ``_core`` and an ``_id``.")
      .def(
          "__enter__", [](nb::handle self) { return nb::borrow(self); }, nb::sig("def __enter__(self) -> object"))
      .def("__exit__", &leave_scope, nb::arg().none(), nb::arg().none(), nb::arg().none(),
           nb::sig("def __exit__(self, kind: object, error: object, at: object, /) -> None"));
}

}  // namespace kvmem
