#include "index/block_tags.h"

#include <algorithm>
#include <cstring>

namespace kvmem {
namespace {

constexpr std::size_t kHead = 9, kPlace = sizeof(std::uint32_t);
static_assert(kHead == 1 + sizeof(std::uint64_t), "a key is encoded as type, length and content");

// Reads the keys of a tag one after the other.
class Reader {
 public:
  explicit Reader(const std::string* tag) : at_(tag ? tag->data() : nullptr), left_(tag ? tag->size() : 0) {}
  bool more() const { return left_ > 0; }
  i64 place() const {
    std::uint32_t place;
    std::memcpy(&place, at_, kPlace);
    return place;
  }
  // Returns the bytes of the current entry, its offset included.
  std::size_t size() const { return kPlace + key_bytes(at_ + kPlace, left_ - kPlace); }
  bool equals(const Reader& other) const { return size() == other.size() && std::memcmp(at_, other.at_, size()) == 0; }
  void next() {
    const std::size_t taken = size();
    at_ += taken, left_ -= taken;
  }

 private:
  const char* at_;
  std::size_t left_;
};

i64 first_repeat(const i32* tokens, i64 n) {
  const i32* const end = tokens + std::max(n, i64{0});
  const i32* const at = std::adjacent_find(tokens, end);
  return at == end ? 0 : at - tokens;
}

}  // namespace

std::size_t key_bytes(const char* encoded, std::size_t bytes) {
  std::uint64_t length = 0;
  if (bytes >= kHead) std::memcpy(&length, encoded + 1, sizeof length);
  if (bytes < kHead || length > bytes - kHead) throw SpecError("extra_key: a key is cut short");
  return kHead + length;
}

KeyMarks decode_marks(const char* encoded, std::size_t bytes) {
  KeyMarks marks;
  while (bytes > 0) {
    i64 position = 0;
    if (bytes < sizeof position) throw SpecError("extra_key: a position is cut short");
    std::memcpy(&position, encoded, sizeof position);
    encoded += sizeof position, bytes -= sizeof position;
    const std::size_t taken = key_bytes(encoded, bytes);
    if (position < kAtPlaceholders || (!marks.empty() && position < marks.back().position)) {
      throw SpecError("extra_key: got position " + std::to_string(position) +
                      "; positions must be 0 or more and must not go back");
    }
    marks.push_back({position, std::string(encoded, taken)});
    encoded += taken, bytes -= taken;
  }
  return marks;
}

KeyMarks placed(const KeyMarks& marks, const i32* tokens, i64 n) {
  KeyMarks found = marks;
  for (KeyMark& mark : found) {
    if (mark.position == kAtPlaceholders) mark.position = first_repeat(tokens, n);
  }
  return found;
}

std::string tag_of_block(const KeyMarks& marks, i64 first, i64 size) {
  std::string tag;
  const auto before = [](const KeyMark& mark, i64 position) { return mark.position < position; };
  for (auto mark = std::lower_bound(marks.begin(), marks.end(), first, before);
       mark != marks.end() && mark->position < first + size; ++mark) {
    const std::uint32_t place = static_cast<std::uint32_t>(mark->position - first);
    tag.append(reinterpret_cast<const char*>(&place), kPlace);
    tag += mark->key;
  }
  return tag;
}

i64 tokens_alike(const std::string* a, const std::string* b, i64 size) {
  Reader one(a), two(b);
  for (; one.more() && two.more(); one.next(), two.next()) {
    if (!one.equals(two)) return std::min(one.place(), two.place());
  }
  if (!one.more() && !two.more()) return size;
  return one.more() ? one.place() : two.place();
}

}  // namespace kvmem
