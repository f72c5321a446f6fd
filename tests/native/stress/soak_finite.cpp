// What kernels may load behind a sequence's tokens, and multiply by 0: were it anything, it could be NaN.
#include <algorithm>
#include <cstring>

#include "soak_side.h"

namespace kvmem_soak {

using namespace kvmem;

void Side::verify_finite(const Live& l, i64 from) {
  if (!promises.finite || geometry.tail_guard_tokens == 0) return;
  compare_finite(*cache, l, from, "");
  if (replica) compare_finite(*replica, l, from, " in the replica");
}

// Paged: to the end of the last block, behind which the table names the trash block. All of it was zeroed, unless the
// sequence itself has written there: before it has grown again, or tokens that it has now.
void Side::compare_finite(Allocator& in, const Live& l, i64 from, const char* where) {
  for (i64 g = 0; g < groups(); ++g) {
    const GroupGeometry& group = geometry.groups[g];
    if (group.growth != Growth::token || l.tokens() == l.fronts[g]) continue;
    const Placement at = in.place(l.handle, g);
    const i64 end = paged ? round_up(l.tokens(), group.block_tokens) : l.tokens() + geometry.tail_guard_tokens;
    for (std::size_t a = 0; a < group.token_bytes.size(); ++a) {
      const i64 bytes = group.token_bytes[a];
      const std::vector<char> zeroes(static_cast<std::size_t>(bytes), 0);
      const Address base = in.pool().space()->arena_base(static_cast<i32>(in.first_arena(g) + static_cast<i64>(a)));
      for (i64 token = std::max(from, l.cut); token < end; ++token) {
        const i64 ordinal = quotient(token, group.block_tokens);
        const i64 block = at.blocks ? at.blocks[ordinal] : at.first_block + ordinal;
        const i64 slot = block * group.block_tokens + remainder(token, group.block_tokens);
        const auto* here = reinterpret_cast<const char*>(base + static_cast<Address>(slot * bytes));
        if (std::memcmp(here, zeroes.data(), zeroes.size()) == 0) continue;
        throw Failure("finite: token " + std::to_string(token) + " of group " + std::to_string(g) + where +
                      " lies behind " + std::to_string(from) + " tokens of " + name(l) +
                      " and holds what somebody wrote");
      }
    }
  }
}

}  // namespace kvmem_soak
