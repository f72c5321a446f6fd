// A record of the kernel's mappings (VMAs) in one reservation: pieces of the address range, each with one file offset
// and one protection. Neighbours that the kernel merges are merged here too, so count() is the number of the kernel's
// mappings.
//
// Invariant: the pieces cover the reservation without gaps, and no two neighbours could be merged. Not thread-safe.
#pragma once

#include <algorithm>
#include <iterator>
#include <map>

#include "base/check.h"
#include "driver/driver.h"

namespace kvmem {

class HostPieces {
 public:
  struct Piece {
    Address end;
    i64 offset;  // in the file, or kHole where nothing is mapped
    bool accessible;
  };
  static constexpr i64 kHole = -1;

  HostPieces(Address base, i64 bytes) : base_(base), end_(base + bytes) { pieces_[base] = {end_, kHole, false}; }

  Address base() const { return base_; }
  i64 bytes() const { return static_cast<i64>(end_ - base_); }
  i64 count() const { return static_cast<i64>(pieces_.size()); }
  bool contains(Address at, i64 bytes) const {
    return at >= base_ && at <= end_ && bytes <= static_cast<i64>(end_ - at);
  }

  // Returns the file offset that is mapped at `at`, or kHole.
  i64 offset_at(Address at) const {
    auto it = find(at);
    return it->second.offset == kHole ? kHole : it->second.offset + static_cast<i64>(at - it->first);
  }

  // Returns whether test(piece) is true for every piece that overlaps [at, at + bytes).
  template <class Test>
  bool all(Address at, i64 bytes, Test test) const {
    for (auto it = find(at); it != pieces_.end() && it->first < at + bytes; ++it) {
      if (!test(it->second)) return false;
    }
    return true;
  }

  // Returns by how much count() would change if the range became a hole: at most 2, and less than 0 where it joins
  // holes. REQUIRES: all of the range is mapped.
  i64 growth_of_unmap(Address at, i64 bytes) const {
    const Address end = at + bytes;
    auto it = find(at);
    i64 growth = 1;
    if (it->first < at) {
      ++growth;  // its left part remains
    } else if (it != pieces_.begin() && std::prev(it)->second.offset == kHole) {
      --growth;
    }
    for (; it != pieces_.end() && it->first < end; ++it) {
      --growth;
      if (it->second.end > end) ++growth;  // its right part remains
    }
    if (it != pieces_.end() && it->first == end && it->second.offset == kHole) --growth;
    return growth;
  }

  // Allocates what the next `changes` calls of map(), unmap() and set_accessible() need. May throw std::bad_alloc.
  void reserve(i64 changes) {
    while (static_cast<i64>(spare_.size()) < 2 * changes) spare_.emplace_hint(spare_.end(), ++spares_made_, Piece());
  }
  // These change the record only, and need no memory. REQUIRES: reserve().
  void map(Address at, i64 bytes, i64 offset, bool accessible) { assign(at, at + bytes, offset, accessible); }
  void unmap(Address at, i64 bytes) { assign(at, at + bytes, kHole, false); }
  void set_accessible(Address at, i64 bytes) {
    // All pieces are cut out before any is merged; otherwise a merged piece would be cut again.
    const Address end = at + bytes;
    split(end);
    auto it = split(at);
    for (auto piece = it; piece != pieces_.end() && piece->first < end; ++piece) piece->second.accessible = true;
    if (it != pieces_.begin()) --it;
    while (it != pieces_.end() && it->first < end) {
      if (!merge_next(it)) ++it;
    }
  }

  // Calls visit(begin, end, piece) for the part of each piece that lies in [at, at + bytes).
  template <class Visit>
  void each(Address at, i64 bytes, Visit visit) const {
    const Address end = at + bytes;
    for (auto it = find(at); it != pieces_.end() && it->first < end; ++it) {
      visit(std::max(it->first, at), std::min(it->second.end, end), it->second);
    }
  }

 private:
  using Map = std::map<Address, Piece>;

  Map::const_iterator find(Address at) const { return --pieces_.upper_bound(at); }

  // Returns the piece that starts at `at`, and cuts one in two if none does. Returns pieces_.end() for the end of the
  // reservation.
  Map::iterator split(Address at) {
    if (at == end_) return pieces_.end();
    auto it = --pieces_.upper_bound(at);
    if (it->first == at) return it;
    Piece right = it->second;
    if (right.offset != kHole) right.offset += static_cast<i64>(at - it->first);
    it->second.end = at;
    KVMEM_ASSERT(!spare_.empty(), "reserve() was called for this change");
    auto piece = spare_.extract(spare_.begin());
    piece.key() = at;
    piece.mapped() = right;
    return pieces_.insert(std::next(it), std::move(piece));
  }

  static bool merges(const Map::value_type& left, const Piece& right) {
    if (left.second.accessible != right.accessible) return false;
    if (left.second.offset == kHole || right.offset == kHole) return left.second.offset == right.offset;
    return left.second.offset + static_cast<i64>(left.second.end - left.first) == right.offset;
  }

  void assign(Address at, Address end, i64 offset, bool accessible) {
    const auto it = split(at), next = split(end);
    pieces_.erase(std::next(it), next);
    it->second = {end, offset, accessible};
    merge_next(it);
    if (it != pieces_.begin()) merge_next(std::prev(it));
    KVMEM_ASSERT(pieces_.begin()->first == base_ && pieces_.rbegin()->second.end == end_, "the pieces cover all");
  }

  bool merge_next(Map::iterator it) {
    const auto next = std::next(it);
    if (next == pieces_.end() || !merges(*it, next->second)) return false;
    it->second.end = next->second.end;
    pieces_.erase(next);
    return true;
  }

  Address base_, end_, spares_made_ = 0;
  Map spare_;   // entries that later changes use
  Map pieces_;  // by start
};

}  // namespace kvmem
