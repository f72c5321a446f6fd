// An array of values for each row, constructed when the row is added. Addresses for all rows are allocated at once,
// which costs no memory before they are touched. So values never move, and the journal can hold references to them.
#pragma once

#include <memory>

#include "base/types.h"

namespace kvmem {

// `kWidth`: the number of values of a row, if it is known at compile time.
template <class T, i64 kWidth = 0>
class RowArray {
 public:
  RowArray() = default;
  // `most`: the largest number of rows; `width`: values of a row; `fill`: their initial value.
  RowArray(i64 most, i64 width, T fill = T())
      : most_(most), width_(width), fill_(std::move(fill)), values_(std::allocator<T>().allocate(most * width)) {}
  ~RowArray() {
    std::destroy_n(values_, size_ * width_);
    if (values_ != nullptr) std::allocator<T>().deallocate(values_, most_ * width_);
  }
  RowArray(const RowArray&) = delete;
  RowArray& operator=(const RowArray&) = delete;
  RowArray& operator=(RowArray&& other) noexcept {
    std::swap(most_, other.most_), std::swap(width_, other.width_), std::swap(size_, other.size_);
    std::swap(fill_, other.fill_), std::swap(values_, other.values_);
    return *this;
  }

  T* of(i64 row) { return values_ + row * (kWidth > 0 ? kWidth : width_); }
  const T* of(i64 row) const { return values_ + row * (kWidth > 0 ? kWidth : width_); }
  T& operator[](i64 row) { return *of(row); }
  const T& operator[](i64 row) const { return *of(row); }
  i64 size() const { return size_; }

  // Adds rows until there are `rows`. Needs no memory.
  void grow(i64 rows) {
    for (; size_ < rows; ++size_) {
      if constexpr (std::is_copy_constructible_v<T>) {
        std::uninitialized_fill_n(of(size_), width_, fill_);
      } else {
        std::uninitialized_value_construct_n(of(size_), width_);
      }
    }
  }

 private:
  i64 most_ = 0, width_ = 0, size_ = 0;
  T fill_ = T();
  T* values_ = nullptr;
};

}  // namespace kvmem
