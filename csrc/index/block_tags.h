// Tags: what the KV of a block depends on besides the token ids, e.g. the image that placeholder ids stand for. A key
// counts from a position of its chain on. The block in which it begins carries it as a tag, and blocks are equal only
// if their tags are. The blocks before it are shared by all; those after it need no tag, since they continue this one.
#pragma once

#include <string>
#include <vector>

#include "base/types.h"

namespace kvmem {

// From token `position` on, the KV depends on `key`. The key is encoded as in kvmem/events/digests.py: one byte of
// type, 8 bytes of length, and so many bytes of content, so that no key is the prefix of another.
struct KeyMark {
  i64 position;
  std::string key;
};
using KeyMarks = std::vector<KeyMark>;  // ascending positions

// In place of a position: where the placeholders begin, i.e. where an id first occurs twice in a row; or position 0, if
// no id does. placed() returns the marks with that position filled in.
constexpr i64 kAtPlaceholders = -1;
KeyMarks placed(const KeyMarks& marks, const i32* tokens, i64 n);

// Returns the tag of the block of tokens [first, first + size): each key that begins there, after its offset in the
// block as 4 bytes; empty if no key does. Cost: a binary search and the bytes written.
std::string tag_of_block(const KeyMarks& marks, i64 first, i64 size);

// Returns how many tokens of a block of `size`, from the first one on, two tags (null for none) do not distinguish.
i64 tokens_alike(const std::string* a, const std::string* b, i64 size);

// Returns the marks that were encoded one after the other, each as a position in 8 bytes and its key. Throws SpecError
// for truncated data and for positions that are negative or descend.
KeyMarks decode_marks(const char* encoded, std::size_t bytes);
// Returns the encoded size of the key at `encoded`; throws SpecError if it is more than `bytes`.
std::size_t key_bytes(const char* encoded, std::size_t bytes);

}  // namespace kvmem
