// Which slots of an arena are mapped: bits in pieces, since of an arena's addresses few are ever used.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/types.h"

namespace kvmem {

class SlotSet {
 public:
  SlotSet() = default;
  explicit SlotSet(i64 slots) : slots_(slots), pieces_(ceil_div(slots, kPiece)) {}

  i64 slots() const { return slots_; }
  bool has(i64 slot) const {
    const Piece* piece = pieces_[slot / kPiece].get();
    return piece != nullptr && ((*piece)[slot % kPiece / 64] >> (slot % 64) & 1) != 0;
  }

  // Before slots [from, to) are put in for the first time: takes memory, so that set() needs none.
  void expect(i64 from, i64 to) {
    for (i64 at = from / kPiece; at < ceil_div(to, kPiece); ++at) {
      if (!pieces_[at]) pieces_[at] = std::make_unique<Piece>();
    }
  }
  void set(i64 from, i64 to, bool mapped) {
    for (i64 slot = from; slot < to; ++slot) {
      std::uint64_t& word = (*pieces_[slot / kPiece])[slot % kPiece / 64];
      const std::uint64_t bit = std::uint64_t{1} << (slot % 64);
      word = mapped ? word | bit : word & ~bit;
    }
  }
  // The first slot from `slot` on that is in, or slots().
  i64 next(i64 slot) const {
    while (slot < slots_ && !has(slot)) slot = pieces_[slot / kPiece] ? slot + 1 : (slot / kPiece + 1) * kPiece;
    return std::min(slot, slots_);
  }

 private:
  static constexpr i64 kPiece = 8192;
  using Piece = std::array<std::uint64_t, kPiece / 64>;
  i64 slots_ = 0;
  std::vector<std::unique_ptr<Piece>> pieces_;
};

}  // namespace kvmem
