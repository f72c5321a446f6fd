// Simulates what a list of ops does to bytes: for each byte, from where its present value was copied. Bytes are
// numbered through all pages: page * page_bytes + offset. Before the list, each byte has its own value.
#pragma once

#include <algorithm>
#include <iterator>
#include <map>
#include <vector>

#include "base/types.h"

namespace kvmem {

class ByteLedger {
 public:
  // [to, to + bytes) no longer has the value of any byte.
  void erase(i64 to, i64 bytes) { put(to, {{bytes, kNowhere}}); }

  // [to, to + bytes) gets the values of [from, from + bytes).
  void copy(i64 to, i64 from, i64 bytes) {
    std::vector<Piece> pieces;
    each(from, bytes, [&pieces](i64, i64 n, i64 origin) { pieces.push_back({n, origin}); });
    put(to, pieces);
  }

  // Returns whether [at, at + bytes) has the values that [origin, origin + bytes) had before the list.
  bool holds(i64 at, i64 origin, i64 bytes) const {
    bool all = true;
    each(at, bytes, [&](i64 offset, i64, i64 from) { all = all && from == origin + offset; });
    return all;
  }

 private:
  static constexpr i64 kNowhere = -1;
  struct Piece {
    i64 bytes, origin;
  };
  struct Written {
    i64 end, origin;  // origin of the first byte; those of the others follow
  };

  // Calls f(offset in the range, bytes, origin) for each part of [at, at + bytes) with consecutive origins.
  template <class F>
  void each(i64 at, i64 bytes, F f) const {
    const i64 end = at + bytes;
    auto next = written_.upper_bound(at);
    if (next != written_.begin() && std::prev(next)->second.end > at) --next;
    for (i64 from = at; from < end;) {
      const bool inside = next != written_.end() && next->first <= from;
      const i64 to = std::min(end, inside ? next->second.end : next != written_.end() ? next->first : end);
      const i64 origin = !inside                           ? from
                         : next->second.origin == kNowhere ? kNowhere
                                                           : next->second.origin + from - next->first;
      f(from - at, to - from, origin);
      from = to;
      if (inside) ++next;
    }
  }

  void put(i64 to, const std::vector<Piece>& pieces) {
    i64 bytes = 0;
    for (const Piece& piece : pieces) bytes += piece.bytes;
    split(to);
    split(to + bytes);
    written_.erase(written_.lower_bound(to), written_.lower_bound(to + bytes));
    for (const Piece& piece : pieces) {
      written_[to] = {to + piece.bytes, piece.origin};
      to += piece.bytes;
    }
  }

  // Splits the entry that extends across `at`, if there is one.
  void split(i64 at) {
    auto next = written_.lower_bound(at);
    if (next == written_.begin() || std::prev(next)->second.end <= at) return;
    Written& before = std::prev(next)->second;
    const i64 origin = before.origin == kNowhere ? kNowhere : before.origin + at - std::prev(next)->first;
    written_.emplace_hint(next, at, Written{before.end, origin});
    before.end = at;
  }

  std::map<i64, Written> written_;  // by the first byte; entries do not overlap
};

}  // namespace kvmem
