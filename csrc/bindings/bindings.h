// What the files that include Python share. Everything else in csrc/ is free of Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <unistd.h>

#include <string>

#include "base/types.h"
#include "bindings/arrays.h"

namespace kvmem {
class Allocator;
struct TableChanges;

// Python's lock comes back to the thread; `state` is what PyEval_SaveThread() returned. A thread that comes back when
// the interpreter is ending never gets it: Python ends such a thread by unwinding its stack, which no destructor
// survives. So it stays here, asleep, until the process is gone.
inline void take_gil(void* state) {
  try {
    PyEval_RestoreThread(static_cast<PyThreadState*>(state));
  } catch (...) {  // it has no exception object that could be named, and C code throws nothing else
    while (true) pause();
  }
}

// Other Python threads run while it lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { take_gil(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

// What a call makes for Python stands in its object's attributes before the call returns: an exception that a signal
// handler raises just then finds it there, and not lost on the way.
inline void keep_in(nanobind::handle object, const char* name, i64 value) {
  if (!object.is_none()) object.attr(name) = value;
}

void bind_drivers(nanobind::module_& m);
void bind_allocator(nanobind::module_& m);
void bind_prefix_options(nanobind::module_& m);
void bind_token_blocks(nanobind::module_& m);
void bind_prefix(nanobind::class_<Allocator>& allocator);
void bind_steps(nanobind::class_<Allocator>& allocator);
void bind_table_changes(nanobind::module_& m, nanobind::class_<Allocator>& allocator);
void bind_batch(nanobind::module_& m, nanobind::class_<Allocator>& allocator);
void bind_events(nanobind::module_& m);
void bind_eviction(nanobind::module_& m);
void bind_scope(nanobind::module_& m);

// None for the most frequent answer, that nothing was written: kvmem has one object for all of those.
nanobind::object to_python(TableChanges changes);  // table_changes.cpp

// Arrays never convert: a conversion would let writes to a wrong-typed output vanish into a temporary copy.
template <class T, int D = 1>
using Out = nanobind::ndarray<T, nanobind::ndim<D>, nanobind::c_contig, nanobind::device::cpu>;

inline void same_length(const Int32s& handles, const Int32s& counts) {
  if (handles.size() != counts.size()) {
    throw SpecError("got " + std::to_string(handles.size()) + " handles and " + std::to_string(counts.size()) +
                    " counts");
  }
}

// Tokens of one call: as many as the counts say.
inline void check_tokens(const Counts& counts, const TokenIds& tokens) {
  i64 wanted = 0;
  for (i64 i = 0; i < counts.size(); ++i) wanted += counts.data()[i] > 0 ? counts.data()[i] : 0;
  if (wanted != tokens.size()) {
    throw SpecError("got " + std::to_string(tokens.size()) + " token ids for counts of " + std::to_string(wanted));
  }
}

}  // namespace kvmem
