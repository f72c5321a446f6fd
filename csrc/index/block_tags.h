// What KV depends on besides its tokens, from a position of its chain on: the image that placeholder ids stand for,
// say. The block in which such a key begins carries it as its tag, and blocks are equal only if their tags are too.
// What comes before is shared with everybody; what comes after hangs below the block, so it needs no tag.
#pragma once

#include <string>
#include <vector>

#include "base/types.h"

namespace kvmem {

// From token `position` on, the KV depends on `key`: 9 bytes or more, of which the last 8 of the first 9 say how many
// follow (kvmem/digests.py), so that no key runs into the next.
struct KeyMark {
  i64 position;
  std::string key;
};
using KeyMarks = std::vector<KeyMark>;  // by position

// In place of a position: where an id first stands twice in a row, since placeholders are a run of one id; or from the
// first token on, where none does.
constexpr i64 kAtPlaceholders = -1;
KeyMarks placed(const KeyMarks& marks, const i32* tokens, i64 n);

// The tag of the block of tokens [first, first + size): the keys that begin in it, each after its place there; empty
// for none. Cost: a binary search, and what is written.
std::string tag_of_block(const KeyMarks& marks, i64 first, i64 size);

// How many tokens of a block of `size` two tags (null for none) leave alike.
i64 tokens_alike(const std::string* a, const std::string* b, i64 size);

// The marks that `encoded` tells of, one after the other: the position in 8 bytes, then the key. SpecError for others.
KeyMarks decode_marks(const char* encoded, std::size_t bytes);
// How many bytes the key at `encoded` takes; SpecError if it goes beyond `bytes`.
std::size_t key_bytes(const char* encoded, std::size_t bytes);

}  // namespace kvmem
