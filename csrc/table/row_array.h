// For each row an array of as many values, made when the row comes to be. The addresses of all that there may be are
// taken at once and cost no memory before they are touched, so rows are added at the end and no value ever moves: the
// journal, and who looks for memory meanwhile, keep references to them.
#pragma once

#include <memory>

#include "base/types.h"

namespace kvmem {

// `kWidth`: how many values each row has, where that is known here.
template <class T, i64 kWidth = 0>
class RowArray {
 public:
  RowArray() = default;
  // `most`: how many rows there may be; `width`: how many values a row has; `fill`: what they are at first.
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

  // To `rows`, if there are fewer; needs no memory.
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
