// Arguments from Python that are many integers: handles of sequences, counts, token ids. int32 arrays are read through
// the buffer protocol (numpy, array, memoryview), which takes a third of the time of nanobind's own arrays; tensors
// without a buffer (torch) through DLPack; lists of ints one by one. Every other argument goes to kvmem's Python code,
// which converts it or raises the error.
//
// Another thread may write to a caller's array at any time. So an input is copied once, under Python's lock, before it
// is checked, and an output is computed in a buffer of this file and copied to the caller's array at the end. The core
// never receives an address of a caller's array.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>
#include <memory>
#include <string>
#include <type_traits>

#include "base/types.h"

namespace kvmem {

// Returns whether the format is int32, with or without a prefix for this machine's byte order.
inline bool is_int32(const Py_buffer& buffer) {
  const char* format = buffer.format;
  if (format && (*format == '=' || *format == '<' || *format == '@')) ++format;
  return format && std::strcmp(format, "i") == 0;
}

// Holds a contiguous int32 [n] on the CPU, never a converted copy. T: const i32, or i32 for an output. REQUIRES:
// Python's lock, also for the destructor.
template <class T>
class HeldArray {
 public:
  HeldArray() = default;
  ~HeldArray() { PyBuffer_Release(&buffer_); }
  HeldArray(const HeldArray&) = delete;
  HeldArray& operator=(const HeldArray&) = delete;

  // Returns false for any other object. REQUIRES: called once.
  bool hold(nanobind::handle given) {
    const int writable = std::is_const_v<T> ? 0 : PyBUF_WRITABLE;
    if (!PyObject_CheckBuffer(given.ptr())) return hold_tensor(given);
    if (PyObject_GetBuffer(given.ptr(), &buffer_, PyBUF_ND | PyBUF_FORMAT | writable) != 0) {
      PyErr_Clear();
      return false;
    }
    if (buffer_.ndim != 1 || !is_int32(buffer_)) return false;
    size_ = buffer_.shape[0];
    data_ = static_cast<T*>(buffer_.buf);
    return true;
  }
  T* data() const { return data_; }
  i64 size() const { return size_; }

 private:
  bool hold_tensor(nanobind::handle given) {
    if (!nanobind::try_cast(given, tensor_, false)) return false;
    size_ = static_cast<i64>(tensor_.shape(0));
    data_ = tensor_.data();
    return true;
  }

  Py_buffer buffer_ = {};
  nanobind::ndarray<T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu> tensor_;
  T* data_ = nullptr;
  i64 size_ = 0;
};

// Reads an int within int32; returns false for any other object, bool included.
inline bool read_int(nanobind::handle given, i32* value) {
  if (!PyLong_CheckExact(given.ptr())) return false;
  int overflow = 0;
  const i64 wide = PyLong_AsLongLongAndOverflow(given.ptr(), &overflow);
  if (overflow != 0 || wide < INT32_MIN || wide > INT32_MAX) return false;
  *value = static_cast<i32>(wide);
  return true;
}

// A copy of an int32 [n] from Python. Up to kNear integers need no heap memory. Throws SpecError for any other
// argument.
class Int32s {
 public:
  Int32s(const Int32s&) = delete;
  Int32s& operator=(const Int32s&) = delete;
  // Returns null if None was given, and only then.
  const i32* data() const { return data_; }
  i64 size() const { return size_; }
  explicit operator bool() const { return data_ != nullptr; }

 protected:
  // Accepts lists of ints that are `least` or more, int32 arrays and, with `optional`, None. ask() converts any other
  // argument to an int32 array, or raises the error.
  template <class Ask>
  Int32s(nanobind::handle given, bool optional, i32 least, const Ask& ask) {
    if ((optional && given.is_none()) || take_list(given, least) || take_array(given)) return;
    const nanobind::object converted = ask();
    if (!take_array(converted)) throw SpecError("a conversion to int32 has failed");
  }
  static nanobind::object module(const char* name) { return nanobind::module_::import_(name); }

 private:
  static constexpr i64 kNear = 64;

  bool take_array(nanobind::handle given) {
    HeldArray<const i32> array;
    if (!array.hold(given)) return false;
    make_room(array.size());
    if (array.size() > 0) std::memcpy(data_, array.data(), array.size() * sizeof(i32));
    return true;
  }
  bool take_list(nanobind::handle given, i32 least) {
    if (!PyList_CheckExact(given.ptr())) return false;
    const Py_ssize_t n = PyList_GET_SIZE(given.ptr());
    make_room(n);
    for (Py_ssize_t i = 0; i < n; ++i) {
      if (!read_int(PyList_GET_ITEM(given.ptr(), i), &data_[i]) || data_[i] < least) return false;
    }
    return true;
  }
  void make_room(i64 n) {
    if (n > INT32_MAX) {
      throw SpecError("got an array of " + std::to_string(n) + " int32; a call takes at most " +
                      std::to_string(INT32_MAX));
    }
    size_ = n;
    if (n > kNear) far_.reset(new i32[n]);
    data_ = n > kNear ? far_.get() : near_;
  }

  std::unique_ptr<i32[]> far_;
  i32 near_[kNear];  // not initialised
  i32* data_ = nullptr;
  i64 size_ = 0;
};

// Counts; `field` names them in an error.
class Counts : public Int32s {
 public:
  Counts(const char* field, nanobind::handle given, bool optional = false)
      : Int32s(given, optional, INT32_MIN, [&] { return module("kvmem.arguments").attr("as_int32")(field, given); }) {}
};

// Handles of an allocator, given as integers or as its sequences.
class Handles : public Int32s {
 public:
  Handles(const char* field, nanobind::handle given, nanobind::handle allocator)
      : Int32s(given, false, INT32_MIN,
               [&] { return module("kvmem.allocator.ids").attr("handles")(field, given, allocator); }) {}
};

// Token ids. Negative ids are refused: a padding value would be shared as if it were a token.
class TokenIds : public Int32s {
 public:
  // `read`: whether the call reads the ids; if not, arrays may contain anything.
  explicit TokenIds(nanobind::handle given, bool optional = false, bool read = true)
      : Int32s(given, optional, 0, [&] { return module("kvmem.allocator.prefix").attr("token_ids")(given); }) {
    if (read) check();
  }
  // The ids of a commit; `verb` names the call in an error.
  TokenIds(nanobind::handle given, const char* verb)
      : Int32s(given, false, 0, [&] { return module("kvmem.allocator.prefix").attr("committed_ids")(verb, given); }) {
    check();
  }

 private:
  void check() const {
    i32 all = 0;
    for (i64 i = 0; i < size(); ++i) all |= data()[i];
    if (all < 0) throw SpecError("tokens: got a negative id; token ids are 0 or more");
  }
};

// Reads one count; `field` names it in an error.
inline i32 to_count(const char* field, nanobind::handle given) {
  i32 value = 0;
  if (read_int(given, &value)) return value;
  return nanobind::cast<i32>(nanobind::module_::import_("kvmem.arguments").attr("check_count")(field, given));
}

// An int32 [n] that a call writes to at its end.
class WritableInt32s {
 public:
  bool hold(nanobind::handle given) { return array_.hold(given); }
  i64 size() const { return array_.size(); }
  // Writes the first `n` values. REQUIRES: Python's lock.
  void write(const i32* values, i64 n) const {
    if (n > 0) std::memcpy(array_.data(), values, n * sizeof(i32));
  }

 private:
  HeldArray<i32> array_;
};

}  // namespace kvmem

namespace nanobind::detail {

template <>
struct type_caster<kvmem::WritableInt32s> {
  NB_TYPE_CASTER(kvmem::WritableInt32s, const_name("NDArray[numpy.int32]"))
  bool from_python(handle src, uint32_t, cleanup_list*) noexcept { return value.hold(src); }
};

}  // namespace nanobind::detail
