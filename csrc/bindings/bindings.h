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

void bind_drivers(nanobind::module_& m);  // bindings_drivers.cpp
void bind_core(nanobind::module_& m);     // bindings_core.cpp
void bind_prefix_options(nanobind::module_& m);
void bind_token_blocks(nanobind::module_& m);
void bind_prefix(nanobind::class_<Allocator>& cache);                          // bindings_prefix.cpp
void bind_requests(nanobind::module_& m, nanobind::class_<Allocator>& cache);  // bindings_requests.cpp
void bind_batch(nanobind::module_& m, nanobind::class_<Allocator>& cache);     // bindings_batch.cpp
void bind_events(nanobind::module_& m);                                        // bindings_events.cpp
void bind_eviction(nanobind::module_& m);                                      // bindings_eviction.cpp
void bind_scope(nanobind::module_& m);                                         // bindings_scope.cpp

// Arrays never convert: a conversion would let writes to a wrong-typed output vanish into a temporary copy.
template <class T, int D = 1>
using Out = nanobind::ndarray<T, nanobind::ndim<D>, nanobind::c_contig, nanobind::device::cpu>;

inline void same_length(const Int32s& handles, const Int32s& counts) {
  if (handles.size() != counts.size()) {
    throw SpecError("got " + std::to_string(handles.size()) + " handles and " + std::to_string(counts.size()) +
                    " counts");
  }
}

// None of them may be negative: a padding value among the ids would be shared as if it were a token.
inline void check_ids(const i32* tokens, i64 n) {
  i32 all = 0;
  for (i64 i = 0; i < n; ++i) all |= tokens[i];
  if (all < 0) throw SpecError("tokens: got a negative id; token ids are 0 or more");
}
template <class Ids>  // Int32s or TokenIds
void check_ids(const Ids& tokens) {
  check_ids(tokens.data(), tokens.size());
}

// Tokens of one call: as many as the counts say.
template <class Ids>
void check_tokens(const Int32s& counts, const Ids& tokens) {
  i64 wanted = 0;
  for (i64 i = 0; i < counts.size(); ++i) wanted += counts.data()[i] > 0 ? counts.data()[i] : 0;
  if (wanted != tokens.size()) {
    throw SpecError("got " + std::to_string(tokens.size()) + " token ids for counts of " + std::to_string(wanted));
  }
}
}  // namespace kvmem
