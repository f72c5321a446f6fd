// The set of mapped slots of an arena: a bitmap in pieces that are allocated on first use, since few of an arena's
// addresses are ever used.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/check.h"
#include "base/types.h"

namespace kvmem {

class SlotSet {
 public:
  SlotSet() = default;
  explicit SlotSet(i64 slots) : slots_(slots), pieces_(ceil_div(slots, kPiece)) {}

  i64 slots() const { return slots_; }  // slot ids are below it
  bool has(i64 slot) const {
    const Piece* piece = pieces_[slot / kPiece].get();
    return piece != nullptr && ((*piece)[slot % kPiece / 64] >> (slot % 64) & 1) != 0;
  }

  // Allocates what set() needs for the slots [from, to). May throw std::bad_alloc.
  void reserve(i64 from, i64 to) {
    for (i64 at = from / kPiece; at < ceil_div(to, kPiece); ++at) {
      if (!pieces_[at]) pieces_[at] = std::make_unique<Piece>();
    }
  }
  // Adds or removes the slots [from, to). REQUIRES: reserve() was called for them. Needs no memory.
  void set(i64 from, i64 to, bool mapped) {
    KVMEM_ASSERT(from >= 0 && to <= slots_, "the slots exist");
    for (i64 slot = from; slot < to; ++slot) {
      KVMEM_ASSERT(pieces_[slot / kPiece] != nullptr, "reserve() was called for the slot");
      std::uint64_t& word = (*pieces_[slot / kPiece])[slot % kPiece / 64];
      const std::uint64_t bit = std::uint64_t{1} << (slot % 64);
      word = mapped ? word | bit : word & ~bit;
    }
  }
  // Returns the first member from `slot` on, or slots() if there is none.
  i64 next(i64 slot) const {
    while (slot < slots_ && !has(slot)) slot = pieces_[slot / kPiece] ? slot + 1 : (slot / kPiece + 1) * kPiece;
    return std::min(slot, slots_);
  }

 private:
  static constexpr i64 kPiece = 8192;
  static_assert(kPiece % 64 == 0, "a piece is a whole number of words");
  using Piece = std::array<std::uint64_t, kPiece / 64>;
  i64 slots_ = 0;
  std::vector<std::unique_ptr<Piece>> pieces_;
};

}  // namespace kvmem
