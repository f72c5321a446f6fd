#include "soak_params.h"

#include <algorithm>
#include <numeric>
#include <sstream>

#include "soak_world.h"

namespace kvmem_soak {

using namespace kvmem;

namespace {

GroupGeometry token_group(Random& random, i64 block, i64 window, i64 max_tokens) {
  GroupGeometry group;
  group.block_tokens = block;
  group.window_tokens = window;
  group.max_tokens = max_tokens;
  for (i64 a = random.between(1, 2); a > 0; --a) {
    group.token_bytes.push_back(random.pick<i64>({8, 16, 24, 48, 64, 112, 136, 256, 512, 520, 1000}));
  }
  return group;
}

GroupGeometry state_group(Random& random) {
  GroupGeometry group;
  group.growth = Growth::fixed;
  group.block_tokens = group.max_tokens = 1;
  for (i64 a = random.between(1, 2); a > 0; --a) {
    group.token_bytes.push_back(random.pick<i64>({8, 104, 512, 2048, 4096, 5000}));
  }
  return group;
}

// One token, less than a block, about a block, five blocks, and what lies between.
i64 draw_window(Random& random, i64 block) {
  switch (random.below(6)) {
    case 0:
      return 1;
    case 1:
      return random.between(1, block);
    case 2:
      return block + random.below(2);
    case 3:
      return random.between(block, 3 * block);
    case 4:
      return 5 * block;
    default:
      return random.between(1, 6 * block);
  }
}

// A divisor of the block, or a small multiple of it or of such.
i64 draw_size(Random& random, i64 block) {
  const i64 divisor = random.pick<i64>({1, 2, 2, 3, 4, 8}), size = block % divisor == 0 ? block / divisor : block;
  return size * random.pick<i64>({1, 1, 1, 2, 3});
}

const char* const kZeroNames[] = {"never", "fresh", "always"};

}  // namespace

Params::Params(u64 world_seed, bool is_paged) : seed(world_seed), paged(is_paged) {
  Random random(mix(world_seed, is_paged));
  draw_groups(random);
  draw_memory(random);
  cached_rows = random.pick<i64>({0, 1, 4, 16, 48});
  guard_tokens = random.one_in(2) ? 0 : random.pick<i64>({1, 8, 40});
  ahead_tokens = random.one_in(4) ? random.pick<i64>({1, 32, 200}) : 0;
  zero = random.pick({Zero::never, Zero::fresh, Zero::fresh, Zero::always});
  policy = random.pick<const char*>({"lru", "density"});
  shares = !random.one_in(12);
  partial = !random.one_in(3);
  event_capacity = random.one_in(3) ? random.pick<i64>({1, 7, 64, 4096}) : 0;
  hash_bits = random.one_in(12) ? 1 : 64;
  allocators = random.one_in(8) ? 2 : 1;
  second_paged = random.one_in(2);
  recording = allocators == 1 && random.one_in(8);
  faults = random.one_in(3);
  careful = random.one_in(3);
  debug = random.one_in(16);
  eager_states = random.one_in(2);
  create_ahead = random.one_in(5);
  timed = random.one_in(2);  // else retention is for ever: the clock moves nothing then, and the digest is compared
  salts = random.between(1, 3);
  alphabet = random.pick<i64>({2, 3, 3, 8, 1000});
  operations = random.between(500, 4000);
  // Now and then an operation is left out or comes often: what one hides, another world shows.
  for (int i = 0; i < kOperations; ++i) {
    const i64 usual = usual_weight(i);
    weights.push_back(random.one_in(8) ? 0 : usual * random.pick<i64>({1, 4, 4, 4, 16}));
  }
  if (faults) weights.back() = usual_weight(kOperations - 1) * random.pick<i64>({4, 16, 64});
  weights[0] = std::max<i64>(weights[0], 16);  // else nothing is ever opened
  if (paged) ahead_tokens = 0;
}

void Params::draw_groups(Random& random) {
  max_tokens = random.pick<i64>({30, 100, 100, 250, 600});
  const i64 common = random.pick<i64>({1, 2, 3, 4, 4, 5, 7, 8, 8, 16, 16, 24, 32, 64});
  const i64 pattern = random.below(16);
  const bool equal = !random.one_in(3);
  // Else of sizes whose common multiple is no more than a few blocks: prefixes are shared there.
  const auto size = [&] { return equal ? common : draw_size(random, common); };
  const auto full = [&] { groups.push_back(token_group(random, size(), 0, max_tokens)); };
  const auto window = [&] {
    const i64 block = size();
    groups.push_back(token_group(random, block, draw_window(random, block), max_tokens));
  };
  if (pattern < 5) {
    full();
  } else if (pattern < 7) {
    window();
  } else if (pattern < 10) {
    full(), window();
  } else if (pattern < 11) {
    window(), full();
  } else if (pattern < 12) {
    window(), window();
  } else if (pattern < 13) {
    full(), window(), window();
  } else if (pattern < 14) {
    full(), groups.push_back(state_group(random));
  } else if (pattern < 15) {
    groups.push_back(state_group(random)), full(), window();
  } else {
    full(), full();
  }
}

void Params::draw_memory(Random& random) {
  page_bytes = random.pick<i64>({4096, 4096, 8192});
  max_sequences = random.pick<i64>({1, 2, 3, 5, 8, 12, 20, 40});
  i64 each = 0, arenas = 0;  // pages that one sequence of the longest takes
  for (const GroupGeometry& group : groups) {
    for (i64 bytes : group.token_bytes) each += ceil_div(group.max_tokens * bytes, page_bytes) + 1, ++arenas;
  }
  const double share = random.pick({0.3, 0.6, 1.0, 2.0, 4.0, static_cast<double>(max_sequences)});
  pages = std::clamp<i64>(static_cast<i64>(static_cast<double>(each) * share), 4 * arenas, 800);
  most_pages = pages + random.below(pages + 1);
}

Geometry Params::geometry(bool is_paged) const {
  Geometry geometry;
  geometry.page_bytes = page_bytes;
  geometry.max_sequences = max_sequences;
  geometry.rows = is_paged ? 0 : 1 + max_sequences + cached_rows;
  geometry.tail_guard_tokens = guard_tokens;
  geometry.map_ahead_tokens = is_paged ? 0 : ahead_tokens;
  geometry.zero = zero;
  geometry.debug = debug;
  for (GroupGeometry group : groups) {
    i64 step = group.block_tokens;
    for (i64 bytes : group.token_bytes) step = std::lcm(step, page_bytes / std::gcd(page_bytes, bytes));
    const i64 guarded = group.max_tokens + guard_tokens;
    group.row_tokens = is_paged ? 0 : round_up(std::max(guarded, 2 * group.block_tokens), step);
    i64 block_bytes = 0;
    for (i64 bytes : group.token_bytes) block_bytes += bytes * group.block_tokens;
    group.max_blocks = is_paged ? kReservedBlocks + most_pages * page_bytes / block_bytes + 1
                                : geometry.rows * group.row_tokens / group.block_tokens;
    for (i64 bytes : group.token_bytes) {
      group.row_slots.push_back(group.row_tokens * bytes / page_bytes);
      group.arena_slots.push_back(is_paged ? ceil_div(group.max_blocks * group.block_tokens * bytes, page_bytes)
                                           : geometry.rows * group.row_slots.back() + 1);
    }
    geometry.groups.push_back(group);
  }
  return geometry;
}

PrefixOptions Params::prefix() const {
  PrefixOptions options;
  options.on = shares;
  options.partial = partial;
  options.policy = policy;
  options.hash_bits = hash_bits;
  options.event_capacity = event_capacity;
  return options;
}

std::string Params::text() const {
  std::ostringstream out;
  out << (paged ? "paged" : "virtual");
  for (const GroupGeometry& group : groups) {
    if (group.growth == Growth::fixed) {
      out << ", state (";
    } else if (group.window_tokens > 0) {
      out << ", window of " << group.window_tokens << " (blocks of " << group.block_tokens << ", ";
    } else {
      out << ", full (blocks of " << group.block_tokens << ", ";
    }
    for (std::size_t a = 0; a < group.token_bytes.size(); ++a) out << (a ? " + " : "") << group.token_bytes[a];
    out << " bytes)";
  }
  out << "; " << pages << " to " << most_pages << " pages of " << page_bytes << ", " << max_sequences
      << " sequences of " << max_tokens << ", rows " << cached_rows << ", guard " << guard_tokens << ", ahead "
      << ahead_tokens << ", zero " << kZeroNames[static_cast<int>(zero)] << ", " << policy;
  if (!shares) out << ", no sharing";
  if (!partial) out << ", whole blocks only";
  if (event_capacity > 0) out << ", events " << event_capacity;
  if (hash_bits < 64) out << ", " << hash_bits << " hash bit";
  if (allocators == 2) out << ", beside another allocator (" << (second_paged ? "paged" : "virtual") << ")";
  if (recording) out << ", followed by a replica";
  if (faults) out << ", driver faults";
  if (debug) out << ", debug";
  out << ", salts " << salts << ", " << operations << " operations";
  return out.str();
}

}  // namespace kvmem_soak
