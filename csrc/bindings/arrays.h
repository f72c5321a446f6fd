// int32 arrays as arguments from Python: by the buffer protocol (numpy, array, memoryview), which takes a third of the
// time that nanobind's own array does; and by DLPack what has no buffer (torch).
//
// Another thread may write to a caller's array at any time. So what is passed in is copied once, under Python's lock,
// before anything is checked; and what is passed out is made in memory of our own and written to the caller's array at
// the end. Nothing in the core ever sees an address of a caller's.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <type_traits>

#include "base/types.h"

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
class HeldArray {
 public:
  HeldArray() = default;
  ~HeldArray() { PyBuffer_Release(&buffer_); }
  HeldArray(const HeldArray&) = delete;
  HeldArray& operator=(const HeldArray&) = delete;

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

// int32 [n] from Python, copied. Up to kNear of them need no memory from the heap.
class Int32s {
 public:
  Int32s() = default;
  Int32s(const Int32s&) = delete;
  Int32s& operator=(const Int32s&) = delete;

  // Once. False for what is no int32 array.
  bool hold(nanobind::handle given) {
    HeldArray<const i32> array;
    if (!array.hold(given)) return false;
    i32* const to = make_room(array.size());
    if (to && array.size() > 0) std::memcpy(to, array.data(), array.size() * sizeof(i32));
    return true;
  }

  // An address also of no ids, since none at all would say that they are not known.
  const i32* data() const { return data_; }

  // To be asked before data(). Throws what hold(), which a caster calls, must not: that there are too many, or no room.
  i64 size() const {
    if (size_ < 0 || data_ == nullptr) fail();
    return size_;
  }

 protected:
  // Null where size() will throw.
  i32* make_room(i64 n) {
    size_ = n;
    if (n > kNear) {
      far_.reset(n > INT32_MAX ? nullptr : new (std::nothrow) i32[n]);
      data_ = far_.get();
    }
    return data_;
  }

 private:
  static constexpr i64 kNear = 64;

  [[noreturn]] void fail() const {
    if (size_ <= INT32_MAX) throw std::bad_alloc();
    throw SpecError("got an array of " + std::to_string(size_) + " int32; a call takes at most " +
                    std::to_string(INT32_MAX));
  }

  std::unique_ptr<i32[]> far_;
  i32 near_[kNear];  // not set: most calls need few
  i32* data_ = near_;
  i64 size_ = 0;
};

// int32 [n] that a call writes to when all is done.
class WritableInt32s {
 public:
  bool hold(nanobind::handle given) { return array_.hold(given); }
  i64 size() const { return array_.size(); }
  // The first `n`, under Python's lock.
  void write(const i32* values, i64 n) const {
    if (n > 0) std::memcpy(array_.data(), values, n * sizeof(i32));
  }

 private:
  HeldArray<i32> array_;
};

// An int that is an int32, and no bool.
inline bool read_int(nanobind::handle given, i32* value) {
  if (!PyLong_CheckExact(given.ptr())) return false;
  int overflow = 0;
  const i64 wide = PyLong_AsLongLongAndOverflow(given.ptr(), &overflow);
  if (overflow != 0 || wide < INT32_MIN || wide > INT32_MAX) return false;
  *value = static_cast<i32>(wide);
  return true;
}

// Token ids: an int32 array, or a list of ints from 0 on, which is what most schedulers have.
class TokenIds : public Int32s {
 public:
  bool hold(nanobind::handle given) {
    if (!PyList_CheckExact(given.ptr())) return Int32s::hold(given);
    const Py_ssize_t n = PyList_GET_SIZE(given.ptr());
    i32* const to = make_room(n);
    for (Py_ssize_t i = 0; to && i < n; ++i) {
      if (!read_int(PyList_GET_ITEM(given.ptr(), i), &to[i]) || to[i] < 0) return false;
    }
    return true;
  }
};

}  // namespace kvmem

namespace nanobind::detail {

template <>
struct type_caster<kvmem::Int32s> {
  NB_TYPE_CASTER(kvmem::Int32s, const_name("NDArray[numpy.int32]"))
  bool from_python(handle src, uint32_t, cleanup_list*) noexcept { return value.hold(src); }
};

template <>
struct type_caster<kvmem::WritableInt32s> {
  NB_TYPE_CASTER(kvmem::WritableInt32s, const_name("NDArray[numpy.int32]"))
  bool from_python(handle src, uint32_t, cleanup_list*) noexcept { return value.hold(src); }
};

template <>
struct type_caster<kvmem::TokenIds> {
  NB_TYPE_CASTER(kvmem::TokenIds, const_name("list[int] | NDArray[numpy.int32]"))
  bool from_python(handle src, uint32_t, cleanup_list*) noexcept { return value.hold(src); }
};

// nanobind's own moves what is held, and these have an address inside of themselves.
template <class T>
struct optional_in_place {
  NB_TYPE_CASTER(std::optional<T>, optional_name(make_caster<T>::Name))
  bool from_python(handle src, uint32_t, cleanup_list*) noexcept { return src.is_none() || value.emplace().hold(src); }
};

template <>
struct type_caster<std::optional<kvmem::Int32s>> : optional_in_place<kvmem::Int32s> {};

template <>
struct type_caster<std::optional<kvmem::TokenIds>> : optional_in_place<kvmem::TokenIds> {};

}  // namespace nanobind::detail
