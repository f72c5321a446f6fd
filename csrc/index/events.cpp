#include "index/events.h"

#include <algorithm>

#include "base/check.h"

namespace kvmem {

void EventRecords::stored(i32 node, i32 parent, i32 root, i32 group, i32 ordinal, const i32* block, i32 tier, Tag tag) {
  kinds.push_back(static_cast<std::int8_t>(EventKind::stored));
  nodes.push_back(node);
  parents.push_back(parent);
  roots.push_back(root);
  groups.push_back(group);
  ordinals.push_back(ordinal);
  tiers.push_back(tier);
  tokens.insert(tokens.end(), block, block + block_tokens);
  tags.push_back(std::move(tag));
}

namespace {

// A record without tokens. The last two are of `kept` records: a host slot and its generation.
void append_bare(EventRecords& out, EventKind kind, i32 node, i32 group, i32 tier, i32 slot = -1, i32 generation = -1) {
  out.kinds.push_back(static_cast<std::int8_t>(kind));
  out.nodes.push_back(node);
  out.parents.push_back(generation);
  out.roots.push_back(-1);
  out.groups.push_back(group);
  out.ordinals.push_back(slot);
  out.tiers.push_back(tier);
}

}  // namespace

EventRing::EventRing(i64 capacity, i64 block_tokens) : capacity_(capacity), block_tokens_(block_tokens) {
  if (capacity < 0 || capacity > INT32_MAX) {
    throw SpecError("events: got a capacity of " + std::to_string(capacity) +
                    "; must be 0 (off) to 2147483647 records");
  }
  if (block_tokens < 1) {
    throw SpecError("events: got " + std::to_string(block_tokens) + " tokens a block; must be 1 or more");
  }
  records_.resize(capacity);
  tokens_.resize(capacity * block_tokens);
}

void EventRing::push(Record&& record, const i32* tokens) noexcept {
  if (!on()) return;
  ++serial_;
  if (broken_ || size_ == capacity_) {
    lost_ += size_ + 1;
    size_ = 0;
    broken_ = true;
    return;
  }
  i64 index = first_ + size_++;
  if (index >= capacity_) index -= capacity_;
  KVMEM_ASSERT(size_ <= capacity_ && index < capacity_, "the ring has room for the record");
  records_[index] = std::move(record);
  if (tokens) std::copy_n(tokens, block_tokens_, &tokens_[index * block_tokens_]);
}

void EventRing::stored(i32 node, i32 parent, i32 root, i32 group, i32 ordinal, const i32* tokens, i32 tier,
                       Tag tag) noexcept {
  push({EventKind::stored, node, parent, root, group, ordinal, tier, std::move(tag)}, tokens);
}

void EventRing::removed(i32 node, i32 group, i32 tier) noexcept {
  push({EventKind::removed, node, -1, -1, group, -1, tier, {}}, nullptr);
}

void EventRing::kept(i32 node, i32 group, i32 slot, i32 generation) noexcept {
  push({EventKind::kept, node, generation, -1, group, slot, 1, {}}, nullptr);
}

void EventRing::cleared() noexcept { push({EventKind::cleared, -1, -1, -1, -1, -1, 0, {}}, nullptr); }

void EventRing::append_to(EventRecords& out, i64 index) const {
  const Record& r = records_[index];
  if (r.kind == EventKind::stored) {
    out.stored(r.node, r.parent, r.root, r.group, r.ordinal, &tokens_[index * block_tokens_], r.tier, r.tag);
  } else {
    append_bare(out, r.kind, r.node, r.group, r.tier, r.ordinal, r.parent);
  }
}

EventRecords EventRing::drain(i64 max, const Resident& resident, bool restart) {
  if (max < -1) throw SpecError("events: got a maximum of " + std::to_string(max) + "; must be 0 or more, or -1");
  EventRecords out;
  out.block_tokens = block_tokens_;
  drained_ = {first_, size_, broken_};
  if (!on()) return out;
  if (broken_ || restart) {
    append_bare(out, EventKind::cleared, -1, -1, 0);
    resident(out);
    size_ = 0;  // the walk has included what these records say
    broken_ = false;
    return out;
  }
  const i64 count = max < 0 ? size_ : std::min(max, size_);
  for (i64 i = 0; i < count; ++i) append_to(out, (first_ + i) % capacity_);
  first_ = (first_ + count) % capacity_;
  size_ -= count;
  return out;
}

}  // namespace kvmem
