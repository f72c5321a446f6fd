// Counts memory that several sequences share, each byte once.
#pragma once

#include <algorithm>
#include <vector>

#include "base/types.h"

namespace kvmem {

// One sequence's part [from, to) of a page or block (a piece) with several references, in any one unit.
struct SharedPart {
  i64 piece = 0, from = 0, to = 0;
};

struct SharedCount {
  i64 length = 0;  // the sum of all parts, overlaps counted once
  i64 pieces = 0;  // pieces with more than one part
};

// Parts may overlap or leave gaps, since windows start and sequences end within a piece.
inline SharedCount count_shared(std::vector<SharedPart>& parts) {
  std::sort(parts.begin(), parts.end(), [](const SharedPart& x, const SharedPart& y) {
    return x.piece != y.piece ? x.piece < y.piece : x.from < y.from;
  });
  SharedCount count;
  for (std::size_t i = 0; i < parts.size();) {
    const std::size_t first = i;
    i64 end = parts[i].from;
    for (; i < parts.size() && parts[i].piece == parts[first].piece; ++i) {
      count.length += std::max(i64{0}, parts[i].to - std::max(end, parts[i].from));
      end = std::max(end, parts[i].to);
    }
    count.pieces += i - first > 1;
  }
  return count;
}

}  // namespace kvmem
