// 16-bit numbers as rows of bytes in which high bytes, middle nibbles and low nibbles lie apart, and back. The rules
// are those of kvmem/layouts/aligned.py, which does the same with torch on other devices.
//
// Thread safety: functions of their arguments only.
#pragma once

#include <cstdint>

#include "base/types.h"

namespace kvmem {

// Rows of `units` times `width` numbers. Strides are in bytes, from one row to the next.
struct Planes {
  i64 rows, units, width;  // width: even
  std::uint16_t* numbers;
  i64 stride;
  unsigned char* bytes;  // of each row: all high bytes, then width / 2 bytes of each unit twice
  i64 bytes_stride;
};
void split_planes(const Planes& p);
void join_planes(const Planes& p);

// The same for blocks of 64 rows of numbers whose transpose is cut: 64 rows of bytes with units of 64 numbers, which
// are those of one column. REQUIRES: rows is a multiple of 64, and so is units * width.
void split_columns(const Planes& p);
void join_columns(const Planes& p);

}  // namespace kvmem
