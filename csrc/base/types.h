// Integers, units, arithmetic and errors, which every file includes. No Python, no torch, no device header.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace kvmem {

// Sizes carry their unit in their name: *_bytes, *_tokens, *_blocks, *_pages. Ranges are half-open.
using i64 = std::int64_t;
using i32 = std::int32_t;

// Errors. bindings/ translates each into the Python class of the same name (kvmem/errors.py). A message says what was
// asked for, what is available, the largest value that would work, and what to change.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class SpecError : public Error {  // an argument that is invalid in every state of the allocator
 public:
  using Error::Error;
};

class OutOfMemory : public Error {  // a scheduling outcome: nothing has changed, so ask for less or free something
 public:
  using Error::Error;
};

class StaleHandle : public Error {  // a sequence that was freed or never existed
 public:
  using Error::Error;
};

class NotReady : public Error {  // a sequence whose blocks are still being loaded from a tier
 public:
  using Error::Error;
};

// A driver call failed for another reason than lack of memory. `call` and `code` name the call and its error code.
class DeviceError : public Error {
 public:
  explicit DeviceError(const std::string& what, std::string call = "", i64 code = 0)
      : Error(what), call_(std::move(call)), code_(code) {}
  const std::string& call() const { return call_; }
  i64 code() const { return code_; }

 private:
  std::string call_;
  i64 code_;
};

// Returns a size, count or id as int32. Throws SpecError, which names the field, where it does not fit.
inline i32 to_int32(i64 value, const char* field) {
  if (value >= INT32_MIN && value <= INT32_MAX) return static_cast<i32>(value);
  throw SpecError(std::string(field) + ": got " + std::to_string(value) + "; must fit an int32, at most " +
                  std::to_string(INT32_MAX));
}

// a / b and a % b. REQUIRES: a >= 0, b > 0. Sizes of blocks and pages are mostly powers of two, for which a shift takes
// a tenth of the time of a 64-bit division; a step makes several of these for each sequence.
constexpr i64 quotient(i64 a, i64 b) { return (b & (b - 1)) == 0 ? a >> __builtin_ctzll(b) : a / b; }
constexpr i64 remainder(i64 a, i64 b) { return (b & (b - 1)) == 0 ? a & (b - 1) : a % b; }
constexpr i64 ceil_div(i64 a, i64 b) { return quotient(a + b - 1, b); }
constexpr i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

}  // namespace kvmem
