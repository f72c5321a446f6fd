// The Python module kvmem._core: converts arguments and errors, and contains no logic.

#include <new>

#include "base/pool_lock.h"
#include "base/types.h"
#include "bindings/bindings.h"

namespace nb = nanobind;
using namespace kvmem;

namespace {

// Raises kvmem.errors.<name>(what, *extra). The classes are Python's, because they derive from MemoryError, ValueError
// and others too.
template <class... Extra>
void raise(const char* name, const char* what, Extra... extra) {
  nb::object type = nb::module_::import_("kvmem.errors").attr(name);
  nb::object error = type(what, extra...);
  PyErr_SetObject(type.ptr(), error.ptr());
}

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const OutOfMemory& e) {
    raise("OutOfMemory", e.what());
  } catch (const SpecError& e) {
    raise("SpecError", e.what());
  } catch (const StaleHandle& e) {
    raise("StaleHandle", e.what());
  } catch (const NotReady& e) {
    raise("NotReady", e.what());
  } catch (const DeviceError& e) {
    raise("DeviceError", e.what(), e.call().c_str(), e.code());
  } catch (const Error& e) {
    raise("KVMemError", e.what());
  } catch (const std::bad_alloc&) {
    raise("OutOfMemory",
          "no host memory for metadata: an allocation of the process failed, and nothing has changed. Free some; or "
          "lower max_sequences, max_tokens or memory, or raise page_bytes");
  }
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "The native half of kvmem: drivers, pages, rows, blocks, sequences.";
#ifdef KVMEM_DEBUG
  m.attr("debug_build") = true;
#else
  m.attr("debug_build") = false;
  nb::set_leak_warnings(false);  // an allocator that lives until the interpreter exits is no leak
#endif
  // A thread that holds the pool may wait for Python's lock, so a thread that waits for the pool releases it.
  wait_hooks = {[]() -> void* { return PyGILState_Check() ? PyEval_SaveThread() : nullptr; }, &take_gil};
  nb::register_exception_translator(translate);
  bind_drivers(m);
  bind_allocator(m);
  bind_eviction(m);
  bind_events(m);
  bind_token_blocks(m);
  bind_scope(m);
  bind_codec(m);
  bind_attend(m);
}
