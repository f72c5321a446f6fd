// int32 arrays as arguments from Python: by the buffer protocol (numpy, array, memoryview), which takes a third of the
// time that nanobind's own array does; and by DLPack what has no buffer (torch).
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "types.h"

namespace kvmem {

// By its format, with or without a mark for the byte order that this machine has.
inline bool is_int32(const Py_buffer& buffer) {
  const char* format = buffer.format;
  if (format && (*format == '=' || *format == '<' || *format == '@')) ++format;
  return format && std::strcmp(format, "i") == 0;
}

// A contiguous int32 [n] on the CPU, held while this lives; Python's lock is needed to make and to destroy one. T:
// const i32, or i32 for one to be written. Never a converted copy: writes to that would be lost.
template <class T>
class Int32Array {
 public:
  Int32Array() = default;
  ~Int32Array() { PyBuffer_Release(&buffer_); }
  Int32Array(const Int32Array&) = delete;
  Int32Array& operator=(const Int32Array&) = delete;

  // Once. False for anything else.
  bool hold(nanobind::handle given) {
    const int writable = std::is_const_v<T> ? 0 : PyBUF_WRITABLE;
    if (!PyObject_CheckBuffer(given.ptr())) return hold_tensor(given);
    if (PyObject_GetBuffer(given.ptr(), &buffer_, PyBUF_ND | PyBUF_FORMAT | writable) != 0) {
      PyErr_Clear();
      return false;
    }
    if (buffer_.ndim != 1 || !is_int32(buffer_)) return false;
    size_ = buffer_.shape[0];
    if (size_ > 0) data_ = static_cast<T*>(buffer_.buf);
    return true;
  }
  T* data() const { return data_; }
  i64 size() const { return size_; }

 private:
  bool hold_tensor(nanobind::handle given) {
    if (!nanobind::try_cast(given, tensor_, false)) return false;
    size_ = static_cast<i64>(tensor_.shape(0));
    if (size_ > 0) data_ = tensor_.data();
    return true;
  }

  Py_buffer buffer_ = {};
  nanobind::ndarray<T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu> tensor_;
  i32 nothing_ = 0;
  T* data_ = &nothing_;  // an address also of no ids, since none at all would say that they are not known
  i64 size_ = 0;
};

using Int32s = Int32Array<const i32>;
using WritableInt32s = Int32Array<i32>;

// An int that is an int32, and no bool.
inline bool read_int(nanobind::handle given, i32* value) {
  if (!PyLong_CheckExact(given.ptr())) return false;
  int overflow = 0;
  const i64 wide = PyLong_AsLongLongAndOverflow(given.ptr(), &overflow);
  if (overflow != 0 || wide < INT32_MIN || wide > INT32_MAX) return false;
  *value = static_cast<i32>(wide);
  return true;
}

// Token ids: an int32 array, or a list of ints from 0 on, which is what most schedulers have. That is copied.
class TokenIds {
 public:
  bool hold(nanobind::handle given) {
    if (!PyList_CheckExact(given.ptr())) return array_.hold(given);
    const Py_ssize_t n = PyList_GET_SIZE(given.ptr());
    try {
      list_.resize(n + 1);  // has an address for n = 0 too
    } catch (const std::bad_alloc&) {
      return lost_ = true;  // this must not throw, but data() may
    }
    for (Py_ssize_t i = 0; i < n; ++i) {
      if (!read_int(PyList_GET_ITEM(given.ptr(), i), &list_[i]) || list_[i] < 0) return false;
    }
    return true;
  }
  const i32* data() const {
    if (lost_) throw std::bad_alloc();
    return list_.empty() ? array_.data() : list_.data();
  }
  i64 size() const { return list_.empty() ? array_.size() : static_cast<i64>(list_.size()) - 1; }

 private:
  Int32s array_;
  std::vector<i32> list_;
  bool lost_ = false;  // there was no memory for the list
};

}  // namespace kvmem

namespace nanobind::detail {

template <class T>
struct type_caster<kvmem::Int32Array<T>> {
  NB_TYPE_CASTER(kvmem::Int32Array<T>, const_name("NDArray[numpy.int32]"))
  bool from_python(handle src, uint32_t, cleanup_list*) noexcept { return value.hold(src); }
};

template <>
struct type_caster<kvmem::TokenIds> {
  NB_TYPE_CASTER(kvmem::TokenIds, const_name("list[int] | NDArray[numpy.int32]"))
  bool from_python(handle src, uint32_t, cleanup_list*) noexcept { return value.hold(src); }
};

// nanobind's own moves what is held, which a Py_buffer forbids.
template <class T>
struct optional_in_place {
  NB_TYPE_CASTER(std::optional<T>, optional_name(make_caster<T>::Name))
  bool from_python(handle src, uint32_t, cleanup_list*) noexcept { return src.is_none() || value.emplace().hold(src); }
};

template <class T>
struct type_caster<std::optional<kvmem::Int32Array<T>>> : optional_in_place<kvmem::Int32Array<T>> {};

template <>
struct type_caster<std::optional<kvmem::TokenIds>> : optional_in_place<kvmem::TokenIds> {};

}  // namespace nanobind::detail
