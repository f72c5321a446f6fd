// What the files of this folder share: locks, checks and helpers. No other folder of csrc/ includes Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "base/types.h"
#include "bindings/arrays.h"

namespace kvmem {
class Allocator;
struct EventBatch;
struct PrefixKey;
struct TableChanges;

// Takes Python's lock again; `state` is what PyEval_SaveThread() returned. While the interpreter shuts down, Python
// ends a thread that asks for the lock by unwinding its stack, and destructors that run then would crash. So such a
// thread sleeps here until the process ends.
inline void take_gil(void* state) {
  try {
    PyEval_RestoreThread(static_cast<PyThreadState*>(state));
  } catch (...) {  // the unwinding has no exception type, and C code throws nothing else
    while (true) pause();
  }
}

// Releases Python's lock for its own lifetime.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { take_gil(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

// Every call of a driver or a pool may block, so other Python threads run meanwhile.
using Free = nanobind::call_guard<WithoutGil>;

// __init__ of T, from the arguments of a constructor or from the fields of an aggregate.
template <class T, class... Args>
void construct(T* self, Args... args) {
  new (self) T{std::forward<Args>(args)...};
}

// Sets an attribute of `object`, unless it is None. A call stores what it has made in the object that will own it
// before it returns, so that an exception which a signal handler raises in between loses nothing.
inline void store_in(nanobind::handle object, const char* name, i64 value) {
  if (!object.is_none()) object.attr(name) = value;
}

void bind_drivers(nanobind::module_& m);
void bind_allocator(nanobind::module_& m);
void bind_prefix_options(nanobind::module_& m);
void bind_token_blocks(nanobind::module_& m);
void bind_prefix(nanobind::class_<Allocator>& allocator);
void bind_tiers(nanobind::class_<Allocator>& allocator);
void bind_steps(nanobind::class_<Allocator>& allocator);
void bind_table_changes(nanobind::module_& m, nanobind::class_<Allocator>& allocator);
void bind_batch(nanobind::module_& m, nanobind::class_<Allocator>& allocator);
void bind_events(nanobind::module_& m);
void bind_eviction(nanobind::module_& m);
void bind_scope(nanobind::module_& m);
void bind_codec(nanobind::module_& m);
void bind_attend(nanobind::module_& m);

// Returns None if nothing was written, which is the most frequent case.
nanobind::object to_python(TableChanges changes);  // table_changes.cpp
// Calls drain() without Python's lock; returns (number, records, roots).
nanobind::tuple to_python(const std::function<std::shared_ptr<EventBatch>()>& drain);  // prefix.cpp
// `extra_key`: the adapter's key, then the marks of the prompt (kvmem.allocator.prefix.encode_keys).
PrefixKey key_of(const nanobind::bytes& salt, const nanobind::bytes& extra_key);  // prefix.cpp

// An output array. It is never converted, because a call would write to the converted copy.
template <class T, int D = 1>
using Out = nanobind::ndarray<T, nanobind::ndim<D>, nanobind::c_contig, nanobind::device::cpu>;

// Frees sequences, pending ones too.
void free_any(Allocator& allocator, const i32* handles, i64 n);  // tiers.cpp

inline void same_length(const Int32s& handles, const Int32s& counts) {
  if (handles.size() != counts.size()) {
    throw SpecError("got " + std::to_string(handles.size()) + " handles and " + std::to_string(counts.size()) +
                    " counts");
  }
}

// Throws SpecError unless there are as many tokens as the counts say.
inline void check_tokens(const Counts& counts, const TokenIds& tokens) {
  i64 wanted = 0;
  for (i64 i = 0; i < counts.size(); ++i) wanted += counts.data()[i] > 0 ? counts.data()[i] : 0;
  if (wanted != tokens.size()) {
    throw SpecError("got " + std::to_string(tokens.size()) + " token ids for counts of " + std::to_string(wanted));
  }
}

}  // namespace kvmem
