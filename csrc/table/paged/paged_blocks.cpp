#include "table/paged/paged_blocks.h"

#include <algorithm>

#include "table/shared_bytes.h"

namespace kvmem {

PagedBlocks::PagedBlocks(const Geometry& geometry, PagePool& pool, const Sequences& sequences, PrefixIndex& index)
    : PageTable(index, geometry), geometry_(geometry), pool_(pool), sequences_(sequences) {
  limit_pages = pool.budget_pages();
  i64 all = 0;
  for (const GroupGeometry& group : geometry.groups) all += static_cast<i64>(group.token_bytes.size());
  base_arena_ = pool.add_owner(this, all);
  try {
    for (const GroupGeometry& group : geometry.groups) add_group(group);
  } catch (...) {
    pool.remove_owner(this);
    throw;
  }
  first_.push_back(static_cast<i64>(pages_.size()));
  copy_tail_.resize(geometry.max_sequences * groups_);
  version_.resize(geometry.max_sequences * groups_);
}

PagedBlocks::~PagedBlocks() {
  pool_.drain();
  for (const ZeroVector<ZeroId>& arena : pages_) {
    for (i32 page : arena) {
      if (page >= 0) pool_.drop_page(page);
    }
  }
  pool_.remove_owner(this);
}

void PagedBlocks::add_group(const GroupGeometry& group) {
  Blocks b(pool_.journal);
  b.max_blocks = group.max_blocks;
  b.tokens = group.block_tokens;
  b.per_sequence = ceil_div(group.max_tokens, group.block_tokens);
  b.unit = unit_tokens(group);
  b.parts = b.unit / b.tokens;
  b.place = stride_;
  stride_ += b.parts;
  b.window = index_.window_of(static_cast<i64>(blocks_.size()));
  b.info.resize(b.max_blocks);
  b.backed.resize(b.max_blocks);
  b.ready.reserve(b.max_blocks);
  if (group.growth == Growth::fixed) b.snapshots.reserve(b.max_blocks);
  // calloc: a table for every sequence at full length is large, and mostly never touched
  b.table.reset(static_cast<i32*>(std::calloc(geometry_.max_sequences * b.per_sequence, sizeof(i32))));
  if (!b.table) throw OutOfMemory("no host memory for the block table");
  first_.push_back(static_cast<i64>(pages_.size()));
  for (std::size_t i = 0; i < group.token_bytes.size(); ++i) {
    pool_.add_arena(this, arena(static_cast<i64>(pages_.size())), group.arena_slots[i]);
    const i64 block_bytes = group.token_bytes[i] * group.block_tokens;
    auto same = std::find_if(b.classes.begin(), b.classes.end(),
                             [&](const SlotClass& c) { return c.block_bytes == block_bytes; });
    if (same == b.classes.end()) {
      SlotClass c;
      c.block_bytes = block_bytes;
      c.slots.resize(group.arena_slots[i]);
      same = b.classes.insert(b.classes.end(), std::move(c));
    }
    same->arenas.push_back(static_cast<i64>(pages_.size()));
    pages_.emplace_back(group.arena_slots[i]);
  }
  for (SlotClass& c : b.classes) {  // the trash blocks are referred to for ever
    for (i64 block = 0; block < kReservedBlocks; ++block) {
      for (i64 slot = first_slot(c, block); slot < end_slot(c, block); ++slot) ++c.slots[slot].users;
    }
  }
  b.info[kNullBlock].refs = b.info[kPaddingBlock].refs = 1;
  blocks_.push_back(std::move(b));
}

bool PagedBlocks::is_whole(const Op& op) const {
  const i64 a = op.at - base_arena_;
  if (a < 0 || a >= static_cast<i64>(pages_.size())) return true;  // a neighbour's
  const SlotClass& c = class_of(a);
  for (i64 slot = op.a; slot < op.a + op.c; ++slot) {
    if (c.slots[slot].mapped != 0 && c.slots[slot].mapped != static_cast<i32>(c.arenas.size())) return false;
  }
  return true;
}

bool PagedBlocks::holds(i64 index, i64 group) const {
  const Blocks& b = blocks_[group];
  const i64 first = sequences_.front(index, group) / b.tokens;
  const i64 end = ceil_div(sequences_.tokens(index, group), b.tokens);
  for (i64 ordinal = 0; ordinal < b.per_sequence; ++ordinal) {
    if ((entry(index, group, ordinal) != 0) != (ordinal >= first && ordinal < end)) return false;
  }
  return true;
}

void PagedBlocks::apply(const Op& op, bool undo) {
  const Entries entries{op.at, sequences_.place_of(op.a), op.b, op.c};
  if (op.kind == OpKind::acquire) return acquire_again(entries);  // take_ready() has done all others
  if (op.kind == OpKind::drop) return undo ? take_back(entries) : drop_all(entries);
  if (op.kind != OpKind::block) throw SpecError(std::string(row_of(op.kind).name) + ": the paged backend has no rows");
  const i64 index = sequences_.index(op.a);
  if (op.at < 0 || op.at >= groups_) throw SpecError("block: no group " + std::to_string(op.at));
  Blocks& b = blocks_[op.at];
  if (op.b < 0 || op.b >= b.per_sequence) throw SpecError("block: no entry " + std::to_string(op.b));
  if (op.c >= b.max_blocks) {
    throw SpecError("block: no block " + std::to_string(op.c) + "; there are " + std::to_string(b.max_blocks) +
                    ": max_sequences, max_tokens and memory must be those of the allocator whose ops are followed");
  }
  i32& place = b.table[index * b.per_sequence + op.b];
  const bool valid = op.c == 0 || (op.c >= kReservedBlocks && op.c < b.max_blocks && b.backed[op.c]);
  if (place != op.d || !valid) {
    throw SpecError("block: entry " + std::to_string(op.b) + " is " + std::to_string(place) + ", not " +
                    std::to_string(op.d) + ", or block " + std::to_string(op.c) + " is not there");
  }
  place = static_cast<i32>(op.c);
  if (op.c != 0) acquire(b, op.c, undo);
  if (op.d != 0) drop(b, op.d, undo);
  if ((undo ? op.c : op.d) == 0) return;  // there was none before
  version_[index * groups_ + op.at] += undo ? -1 : 1;
  reset_room(index, op.at);
}

bool PagedBlocks::is_mapped(i32 arena, i64 slot, i64 count) const {
  const ZeroVector<ZeroId>& pages = pages_[arena - base_arena_];
  return std::all_of(pages.begin() + slot, pages.begin() + slot + count, [](i32 page) { return page >= 0; });
}

const SlotClass& PagedBlocks::class_of(i64 a) const {
  const std::vector<SlotClass>& classes = blocks_[group_of(a)].classes;
  return *std::find_if(classes.begin(), classes.end(), [&](const SlotClass& c) {
    return std::find(c.arenas.begin(), c.arenas.end(), a) != c.arenas.end();
  });
}

void PagedBlocks::list_snapshot(Blocks& b, i64 block) { b.snapshots.add_last(block); }

// So many more referenced, and so many more kept blocks touch the slots of these `n` on end, each of them.
template <i32 kUsers, i32 kKept>
void PagedBlocks::count(Blocks& b, i64 first, i64 n) {
  for (SlotClass& c : b.classes) {
    if (n == 1 || remainder(c.block_bytes, page_bytes()) == 0) {  // no slot has two of them
      use<kUsers, kKept>(c, first, n);
      continue;
    }
    for (i64 block = first; block < first + n; ++block) use<kUsers, kKept>(c, block, 1);
  }
}

template <i32 kUsers, i32 kKept>
void PagedBlocks::use(SlotClass& c, i64 first, i64 n) {
  const i64 from = first_slot(c, first), to = end_slot(c, first + n - 1);
  i64 idle = 0, spare = 0;
  for (SlotInfo *slot = c.slots.data() + from, *end = c.slots.data() + to; slot < end; ++slot) {
    if (kUsers >= 0 && slot->users == 0) idle -= slot->mapped, spare -= slot->cached == 0 ? slot->mapped : 0;
    slot->users += kUsers, slot->cached += kKept;
    if (kUsers <= 0 && slot->users == 0) idle += slot->mapped, spare += slot->cached == 0 ? slot->mapped : 0;
  }
  idle_pages_ += idle;
  spare_pages_ += spare;
}

void PagedBlocks::count_cached(Blocks& b, i64 block) {
  ++b.cached;
  count<0, 1>(b, block, 1);
}

void PagedBlocks::uncount_cached(Blocks& b, i64 block) {
  unlist(b, block);
  count<0, -1>(b, block, 1);
}

void PagedBlocks::acquire(Blocks& b, i64 block, bool undo) {
  if (b.info[block].refs++ > 0) {
    ++b.extra_refs;
  } else if (b.info[block].node != kNoNode) {
    unlist(b, block);
    count<1, -1>(b, block, 1);
    if (b.window >= 0) index_.need(b.info[block].node, b.window, undo);
  } else {
    b.ready.remove(block);
    count<1, 0>(b, block, 1);
  }
}

void PagedBlocks::drop(Blocks& b, i64 block, bool undo) {
  if (--b.info[block].refs > 0) {
    --b.extra_refs;
  } else if (b.info[block].node != kNoNode) {
    ++b.cached;
    count<-1, 1>(b, block, 1);
    if (b.window >= 0) index_.unneed(b.info[block].node, b.window, undo);
  } else {
    b.ready.add(block);
    count<-1, 0>(b, block, 1);
  }
}

i64 PagedBlocks::take_ready(Blocks& b, i32* entry) {
  const i64 block = b.ready.take_first();
  *entry = static_cast<i32>(block);
  b.info[block].refs = 1;
  count<1, 0>(b, block, 1);
  return 1;
}

i64 PagedBlocks::take_ready(Blocks& b, i64 most, i32* entries) {
  const i64 first = b.ready.first(), n = std::min(b.ready.run(first), most);
  for (i64 k = 0; k < n; ++k) {
    entries[k] = static_cast<i32>(first + k);
    b.info[first + k].refs = 1;
  }
  b.ready.remove(first, n);
  count<1, 0>(b, first, n);
  return n;
}

// Undoes drop_all(). They may have been anything.
void PagedBlocks::acquire_again(const Entries& e) {
  Blocks& b = blocks_[e.group];
  const i32* entries = &b.table[e.index * b.per_sequence + e.first];
  for (i64 i = 0; i < e.count; ++i) acquire(b, entries[i], true);
  --version_[e.index * groups_ + e.group];
  dropped_.pop_back();
}

void PagedBlocks::drop_all(const Entries& e) {
  dropped_.push_back(e);  // first: it may find no memory
  Blocks& b = blocks_[e.group];
  const i32* entries = &b.table[e.index * b.per_sequence + e.first];
  // What becomes of a block that its last user leaves; of others, nothing.
  enum class Becomes : std::uint8_t { ready, cached, shared };
  const auto becomes = [&b](i64 block) {
    const BlockInfo& info = b.info[block];
    return info.refs > 1 ? Becomes::shared : info.node == kNoNode ? Becomes::ready : Becomes::cached;
  };
  for (i64 i = 0, n = 1; i < e.count; i += n) {
    const i64 first = entries[i];
    const Becomes kind = becomes(first);
    for (n = 1; i + n < e.count && entries[i + n] == first + n && becomes(first + n) == kind;) ++n;
    for (BlockInfo *info = &b.info[first], *end = info + n; info != end; ++info) {
      --info->refs;
      if (info->node != kNoNode) index_.prefetch(info->node);
    }
    if (kind == Becomes::shared) {
      b.extra_refs -= n;
      continue;
    }
    if (kind == Becomes::ready) {
      b.ready.add(first, n);
      count<-1, 0>(b, first, n);
    } else {
      b.cached += n;
      count<-1, 1>(b, first, n);
    }
  }
  // The last block first, as those of other groups, which leave with the sequence's chain.
  for (i64 i = b.window < 0 ? 0 : e.count; i-- > 0;) {
    const BlockInfo& info = b.info[entries[i]];
    if (info.refs == 0 && info.node != kNoNode) index_.unneed(info.node, b.window, false);
  }
  ++version_[e.index * groups_ + e.group];
  reset_room(e.index, e.group);
}

// Undoes what take_ready() gave: the entries were none before.
void PagedBlocks::take_back(const Entries& e) {
  Blocks& b = blocks_[e.group];
  i32* entries = &b.table[e.index * b.per_sequence + e.first];
  for (i64 i = e.count; i-- > 0;) {
    drop(b, entries[i], true);
    entries[i] = 0;
  }
  reset_room(e.index, e.group);
}

void PagedBlocks::wipe_dropped() {
  for (const Entries& e : dropped_) {
    Blocks& b = blocks_[e.group];
    std::fill_n(&b.table[e.index * b.per_sequence + e.first], e.count, 0);
  }
  dropped_.clear();
}

void PagedBlocks::on_content(const Op& op, bool undo) {
  const i32 node = static_cast<i32>(op.a);
  switch (op.kind) {
    case OpKind::shift:
      return shift(op.b, node, op.d, op.c);
    case OpKind::aside:
      return index_.skip_item({node, static_cast<i32>(op.b)});
    case OpKind::back:
      return index_.unskip({node, static_cast<i32>(op.b)});
    case OpKind::demote:
      return on_demote(op, undo);
    case OpKind::hold:
      return attach(op.b, node, static_cast<i32>(op.c), op.d, undo);
    default:
      return detach(op.b, node, static_cast<i32>(op.c), op.d, undo);
  }
}

void PagedBlocks::attach(i64 g, i32 node, i32 block, i64 part, bool undo) {
  Blocks& b = blocks_[g];
  if (!undo) index_.expect_copies();
  const i64 at = node * stride_ + b.place + part;
  if (at >= static_cast<i64>(block_of_.size())) block_of_.resize(index_.capacity() * stride_);
  if (b.info[block].refs == 0) {
    b.ready.remove(block);
    count_cached(b, block);
  }
  if (part == 0) index_.add_copy(node, g, undo);
  if (b.window >= 0) {
    if (b.info[block].refs > 0) index_.need(node, b.window);
    if (part == 0) index_.add_window_copy(node, b.window, undo);
  }
  b.info[block].node = node;
  block_of_[at] = block;
}

void PagedBlocks::detach(i64 g, i32 node, i32 block, i64 part, bool undo) {
  Blocks& b = blocks_[g];
  if (!undo) index_.expect_change();
  if (b.info[block].refs == 0) {
    uncount_cached(b, block);
    b.ready.add(block);
  }
  if (b.window >= 0) {
    if (part == 0) index_.drop_window_copy(node, b.window, undo);
    if (b.info[block].refs > 0) index_.unneed(node, b.window, undo);
  }
  if (part == 0) index_.drop_copy(node, g, undo);
  b.info[block].node = kNoNode;
  block_of_[node * stride_ + b.place + part] = 0;
}

void PagedBlocks::change(const Op& op, bool mapped) {
  const i64 a = op.at - base_arena_;
  Blocks& b = blocks_[group_of(a)];
  SlotClass& c = const_cast<SlotClass&>(class_of(a));
  ZeroVector<ZeroId>& pages = pages_[a];
  for (i64 i = 0; i < op.c; ++i) {
    if (pages[op.a + i] != (mapped ? -1 : op.b + i) || (mapped && pool_.refs(op.b + i) > 0) ||
        (!mapped && c.slots[op.a + i].users + c.slots[op.a + i].cached > 0 && !growing(op))) {
      throw SpecError(std::string(mapped ? "map" : "unmap") + ": slot " + std::to_string(op.a + i) + " shows page " +
                      std::to_string(pages[op.a + i]) + " and has " + std::to_string(c.slots[op.a + i].users) +
                      " users");
    }
  }
  if (!mapped) b.ready.expect(ceil_div(op.c * page_bytes(), c.block_bytes) + 2);
  for (i64 i = 0; i < op.c; ++i) {
    const i64 slot = op.a + i;
    pages[slot] = mapped ? static_cast<i32>(op.b + i) : -1;
    c.slots[slot].mapped += mapped ? 1 : -1;
    if (c.slots[slot].users == 0) idle_pages_ += mapped ? 1 : -1;
    if (c.slots[slot].users + c.slots[slot].cached == 0) spare_pages_ += mapped ? 1 : -1;
  }
  refresh(b, c, op.a, op.a + op.c);
}

i64 PagedBlocks::biggest_block(i64 a) const {
  i64 g = 0;
  while (a >= first_[g + 1]) ++g;
  i64 bytes = 0;
  for (const SlotClass& c : blocks_[g].classes) bytes = std::max(bytes, c.block_bytes);
  return bytes;
}

void PagedBlocks::refresh(Blocks& b, const SlotClass& changed, i64 from, i64 to) {
  const i64 first = from * page_bytes() / changed.block_bytes;
  const i64 end = std::min(b.max_blocks, ceil_div(to * page_bytes(), changed.block_bytes));
  for (i64 block = first; block < end; ++block) {
    bool backed = true;
    for (const SlotClass& c : b.classes) {
      for (i64 slot = first_slot(c, block); backed && slot < end_slot(c, block); ++slot) {
        backed = c.slots[slot].mapped == static_cast<i32>(c.arenas.size());
      }
    }
    if (backed == (b.backed[block] != 0)) continue;
    b.backed[block] = backed;
    if (!backed) b.cursor = std::min(b.cursor, std::max(block, kReservedBlocks));
    if (b.info[block].refs > 0) continue;
    if (backed) {
      b.ready.add(block);
    } else {
      b.ready.remove(block);
    }
  }
}

}  // namespace kvmem
