// What the files that include Python share. Everything else in csrc/ is free of Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "types.h"

namespace kvmem {
class Cache;

void bind_drivers(nanobind::module_& m);  // bindings_drivers.cpp
void bind_core(nanobind::module_& m);     // bindings_core.cpp
void bind_prefix_options(nanobind::module_& m);
void bind_token_blocks(nanobind::module_& m);
void bind_prefix(nanobind::class_<Cache>& cache);                       // bindings_prefix.cpp
void bind_requests(nanobind::class_<Cache>& cache);                     // bindings_requests.cpp
void bind_batch(nanobind::module_& m, nanobind::class_<Cache>& cache);  // bindings_batch.cpp
void bind_events(nanobind::module_& m);                                 // bindings_events.cpp
void bind_eviction(nanobind::module_& m);                               // bindings_eviction.cpp

// Arrays never convert: a conversion would let writes to a wrong-typed output vanish into a temporary copy.
template <class T>
using In = nanobind::ndarray<const T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
template <class T, int D = 1>
using Out = nanobind::ndarray<T, nanobind::ndim<D>, nanobind::c_contig, nanobind::device::cpu>;

inline void same_length(const In<i32>& handles, const In<i32>& counts) {
  if (handles.shape(0) != counts.shape(0)) {
    throw SpecError("got " + std::to_string(handles.shape(0)) + " handles and " + std::to_string(counts.shape(0)) +
                    " counts");
  }
}

// None of them may be negative: a padding value among the ids would be shared as if it were a token.
inline void check_ids(const i32* tokens, size_t n) {
  i32 all = 0;
  for (size_t i = 0; i < n; ++i) all |= tokens[i];
  if (all < 0) throw SpecError("tokens: got a negative id; token ids are 0 or more");
}
inline void check_ids(const In<i32>& tokens) { check_ids(tokens.data(), tokens.shape(0)); }

// Tokens of one call: as many as the counts say.
inline void check_tokens(const In<i32>& counts, const In<i32>& tokens) {
  i64 wanted = 0;
  for (size_t i = 0; i < counts.shape(0); ++i) wanted += counts.data()[i] > 0 ? counts.data()[i] : 0;
  if (wanted != static_cast<i64>(tokens.shape(0))) {
    throw SpecError("got " + std::to_string(tokens.shape(0)) + " token ids for counts of " + std::to_string(wanted));
  }
}
}  // namespace kvmem
