// What the content index is about: keys, kinds of groups, and the items that are cached and evicted.
#pragma once

#include <string>

#include "base/types.h"
#include "index/block_tags.h"

namespace kvmem {

constexpr i32 kNoNode = -1;

// The identity under which content is shared: sequences share blocks only if salt and extra key are equal, byte for
// byte, and so are the marks that begin in those blocks.
struct PrefixKey {
  std::string salt, extra_key;  // extra_key names the adapter
  KeyMarks marks;               // of one prompt; a root has none
};

// How a group of the cache takes part in sharing.
enum class GroupKind : std::uint8_t {
  none,    // it has no content that can be shared
  full,    // it holds every token of a sequence
  window,  // it holds the last tokens of a sequence
  state,   // it holds snapshots of a fixed state, at the end of some blocks
};

// A unit of eviction: the part of a node in sliding-window group number `window`; or, with window -1, the whole node,
// without which nothing that continues it can be found.
struct Item {
  i32 node = kNoNode;
  i32 window = -1;
};

// A cached block whose first `tokens` tokens match.
struct PartOfBlock {
  i32 node;
  i64 tokens;
};

}  // namespace kvmem
