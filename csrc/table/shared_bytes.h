// Counting memory that several sequences hold, each byte once.
#pragma once

#include <algorithm>
#include <vector>

#include "base/types.h"

namespace kvmem {

// What one sequence has in a page or block that is referred to more than once: [from, to), in any one unit.
struct SharedPart {
  i64 piece = 0, from = 0, to = 0;
};

struct SharedCount {
  i64 length = 0;  // of all parts, overlaps counted once
  i64 pieces = 0;  // that more than one part lies in
};

// Parts may overlap or leave gaps: one sequence's window has left the front of a page, another was truncated there.
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
