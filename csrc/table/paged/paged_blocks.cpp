#include "table/paged/paged_blocks.h"

namespace kvmem {

PagedBlocks::PagedBlocks(const TableContext& context, GrowthMarks& marks) : TableContext(context), marks_(marks) {
  for (const GroupGeometry& group : geometry_.groups) add_group(group);
  version_.resize(geometry_.max_sequences * groups_);
}

PagedBlocks::~PagedBlocks() {
  pool_.drain();
  for (const ZeroVector<ZeroId>& arena : pages_) {
    for (i32 page : arena) {
      if (page >= 0) pool_.drop_page(page);
    }
  }
}

void PagedBlocks::add_group(const GroupGeometry& group) {
  Blocks b(pool_.journal);
  b.max_blocks = group.max_blocks;
  b.tokens = group.block_tokens;
  b.per_sequence = ceil_div(group.max_tokens, group.block_tokens);
  b.unit = unit_tokens(group);
  b.parts = b.unit / b.tokens;
  b.first_part = stride_;
  stride_ += b.parts;
  b.window = index_.window_of(static_cast<i64>(blocks_.size()));
  b.info.resize(b.max_blocks);
  b.backed.resize(b.max_blocks);
  b.ready.reserve(b.max_blocks);
  if (group.growth == Growth::fixed) b.snapshots.reserve(b.max_blocks);
  // calloc, because tables for all sequences at full length are large, and mostly never touched.
  b.table.reset(static_cast<i32*>(std::calloc(geometry_.max_sequences * b.per_sequence, sizeof(i32))));
  if (!b.table)
    throw OutOfMemory("no host memory for a block table of " + std::to_string(geometry_.max_sequences) + " x " +
                      std::to_string(b.per_sequence) + " entries: lower max_sequences or max_tokens");
  for (std::size_t i = 0; i < group.token_bytes.size(); ++i) {
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
  for (SlotClass& c : b.classes) {  // the reserved blocks are always referenced
    for (i64 block = 0; block < kReservedBlocks; ++block) {
      for (i64 slot = first_slot(c, block); slot < end_slot(c, block); ++slot) ++c.slots[slot].users;
    }
  }
  b.info[kNullBlock].refs = b.info[kPaddingBlock].refs = 1;
  blocks_.push_back(std::move(b));
}

// ---- what is derived -----------------------------------------------------------------------------

const SlotClass& PagedBlocks::class_of(i64 a) const {
  const std::vector<SlotClass>& classes = blocks_[group_of(a)].classes;
  return *std::find_if(classes.begin(), classes.end(), [&](const SlotClass& c) {
    return std::find(c.arenas.begin(), c.arenas.end(), a) != c.arenas.end();
  });
}

bool PagedBlocks::is_mapped(i64 a, i64 slot, i64 count) const {
  const ZeroVector<ZeroId>& pages = pages_[a];
  return std::all_of(pages.begin() + slot, pages.begin() + slot + count, [](i32 page) { return page >= 0; });
}

bool PagedBlocks::is_whole(const Op& op) const {
  if (!is_own_arena(op.at)) return true;
  const SlotClass& c = class_of(local_arena(op.at));
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

i64 PagedBlocks::first_unbacked(i64 group) {
  Blocks& b = blocks_[group];
  while (b.cursor < b.max_blocks && b.backed[b.cursor]) ++b.cursor;
  return b.cursor;
}

i64 PagedBlocks::missing_pages(i64 group, i64 block) const { return unbacked_run(group, block, 1, 0).pages; }

PagedBlocks::Run PagedBlocks::unbacked_run(i64 group, i64 first, i64 wanted, i64 room) const {
  const Blocks& b = blocks_[group];
  const auto missing = [&](const SlotClass& c, i64 from, i64 to) {
    i64 pages = 0;
    for (i64 slot = from; slot < to; ++slot) {
      if (c.slots[slot].mapped == 0) pages += static_cast<i64>(c.arenas.size());
    }
    return pages;
  };
  Run run{first + 1, 0};
  for (const SlotClass& c : b.classes) run.pages += missing(c, first_slot(c, first), end_slot(c, first));
  for (; run.end < b.max_blocks && run.end - first < wanted && !b.backed[run.end]; ++run.end) {
    i64 pages = run.pages;
    for (const SlotClass& c : b.classes) {  // a slot that the block before touches is counted already
      pages += missing(c, std::max(first_slot(c, run.end), end_slot(c, run.end - 1)), end_slot(c, run.end));
    }
    if (pages > room) break;
    run.pages = pages;
  }
  return run;
}

// ---- references ----------------------------------------------------------------------------------

// Of blocks [first, first + n), kUsers more become referenced each, and kCached more cached, on the slots they touch.
template <i32 kUsers, i32 kCached>
void PagedBlocks::count(Blocks& b, i64 first, i64 n) {
  for (SlotClass& c : b.classes) {
    if (n == 1 || remainder(c.block_bytes, page_bytes()) == 0) {  // no slot has two of them
      count_on<kUsers, kCached>(c, first, n);
      continue;
    }
    for (i64 block = first; block < first + n; ++block) count_on<kUsers, kCached>(c, block, 1);
  }
}

template <i32 kUsers, i32 kCached>
void PagedBlocks::count_on(SlotClass& c, i64 first, i64 n) {
  const i64 from = first_slot(c, first), to = end_slot(c, first + n - 1);
  i64 unreferenced = 0, empty = 0;
  for (SlotInfo *slot = c.slots.data() + from, *end = c.slots.data() + to; slot < end; ++slot) {
    if (kUsers >= 0 && slot->users == 0) {
      unreferenced -= slot->mapped, empty -= slot->cached == 0 ? slot->mapped : 0;
    }
    slot->users += kUsers, slot->cached += kCached;
    KVMEM_ASSERT(slot->users >= 0 && slot->cached >= 0, "blocks on a slot are counted");
    if (kUsers <= 0 && slot->users == 0) {
      unreferenced += slot->mapped, empty += slot->cached == 0 ? slot->mapped : 0;
    }
  }
  unreferenced_pages_ += unreferenced;
  empty_pages_ += empty;
}

void PagedBlocks::enter_cached(Blocks& b, i64 block) {
  ++b.cached;
  count<0, 1>(b, block, 1);
}

void PagedBlocks::leave_cached(Blocks& b, i64 block) {
  unlist(b, block);
  count<0, -1>(b, block, 1);
}

void PagedBlocks::acquire(Blocks& b, i64 block, bool undo) {
  KVMEM_ASSERT(b.backed[block] && b.info[block].refs >= 0, "a referenced block has memory");
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
  KVMEM_ASSERT(b.info[block].refs > 0, "references are counted");
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

PagedBlocks::Allocated PagedBlocks::allocate(i64 index, i64 group, i64 first, i64 most) {
  Blocks& b = blocks_[group];
  i32* const entries = &b.table[index * b.per_sequence + first];
  KVMEM_ASSERT(!b.ready.empty() && most > 0 && entries[0] == 0, "there is a ready block for an entry that is none");
  b.ready.expect(most);  // may throw
  if (most == 1) {
    const i64 block = b.ready.take_first();
    entries[0] = static_cast<i32>(block);
    b.info[block].refs = 1;
    count<1, 0>(b, block, 1);
    return {block, 1};
  }
  const i64 block = b.ready.first(), n = std::min(b.ready.run(block), most);
  for (i64 k = 0; k < n; ++k) {
    entries[k] = static_cast<i32>(block + k);
    b.info[block + k].refs = 1;
  }
  b.ready.remove(block, n);
  count<1, 0>(b, block, n);
  return {block, n};
}

void PagedBlocks::take_back(const Entries& e) {
  Blocks& b = blocks_[e.group];
  i32* entries = &b.table[e.index * b.per_sequence + e.first];
  for (i64 i = e.count; i-- > 0;) {
    drop(b, entries[i], true);
    entries[i] = 0;
  }
  marks_.reset_room(e.index, e.group);
}

void PagedBlocks::drop_all(const Entries& e) {
  dropped_.push_back(e);  // first, because it may throw
  Blocks& b = blocks_[e.group];
  const i32* entries = &b.table[e.index * b.per_sequence + e.first];
  // What becomes of a block that loses this reference.
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
      KVMEM_ASSERT(info->refs > 0, "references are counted");
      --info->refs;
      if (info->node != kNoNode) index_.prefetch(info->node);
    }
    if (kind == Becomes::shared) {
      b.extra_refs -= n;
    } else if (kind == Becomes::ready) {
      b.ready.add(first, n);
      count<-1, 0>(b, first, n);
    } else {
      b.cached += n;
      count<-1, 1>(b, first, n);
    }
  }
  // The last block first, the order in which a chain is released in other groups.
  for (i64 i = b.window < 0 ? 0 : e.count; i-- > 0;) {
    const BlockInfo& info = b.info[entries[i]];
    if (info.refs == 0 && info.node != kNoNode) index_.unneed(info.node, b.window, false);
  }
  ++version_[e.index * groups_ + e.group];
  marks_.reset_room(e.index, e.group);
}

void PagedBlocks::acquire_again(const Entries& e) {
  KVMEM_ASSERT(!dropped_.empty() && dropped_.back().first == e.first, "drops are undone newest first");
  Blocks& b = blocks_[e.group];
  const i32* entries = &b.table[e.index * b.per_sequence + e.first];
  for (i64 i = 0; i < e.count; ++i) acquire(b, entries[i], true);
  --version_[e.index * groups_ + e.group];
  dropped_.pop_back();
}

void PagedBlocks::finish() {
  release_kept(false);
  for (const Entries& e : dropped_) {
    Blocks& b = blocks_[e.group];
    std::fill_n(&b.table[e.index * b.per_sequence + e.first], e.count, 0);
  }
  dropped_.clear();
}

void PagedBlocks::release_kept(bool undo) {
  if (kept_.empty()) return;
  for (const Kept& kept : kept_) {
    if (kept.referenced) drop(blocks_[kept.group], kept.block, undo);
  }
  kept_.clear();
}

void PagedBlocks::apply(const Op& op, bool undo) {
  const Entries entries{op.at, sequences_.place_of(op.a), op.b, op.c};
  if (op.kind == OpKind::acquire) return acquire_again(entries);  // others are made by allocate()
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
  i32& entry = b.table[index * b.per_sequence + op.b];
  const bool valid = op.c == 0 || (op.c >= kReservedBlocks && op.c < b.max_blocks && b.backed[op.c]);
  if (entry != op.d || !valid) {
    throw SpecError("block: entry " + std::to_string(op.b) + " is " + std::to_string(entry) + ", not " +
                    std::to_string(op.d) + ", or block " + std::to_string(op.c) + " is not there");
  }
  entry = static_cast<i32>(op.c);
  if (op.c != 0) acquire(b, op.c, undo);
  if (op.d != 0) drop(b, op.d, undo);
  if ((undo ? op.c : op.d) == 0) return;  // there was none before
  version_[index * groups_ + op.at] += undo ? -1 : 1;
  marks_.reset_room(index, op.at);
}

// ---- pages ---------------------------------------------------------------------------------------

void PagedBlocks::change(const Op& op, bool mapped) {
  const i64 a = local_arena(op.at);
  Blocks& b = blocks_[group_of(a)];
  SlotClass& c = const_cast<SlotClass&>(class_of(a));
  ZeroVector<ZeroId>& pages = pages_[a];
  for (i64 i = 0; i < op.c; ++i) {
    const SlotInfo& slot = c.slots[op.a + i];
    const bool in_use = mapped ? pool_.refs(op.b + i) > 0 : slot.users + slot.cached > 0 && !is_of_reserved(b, op);
    if (pages[op.a + i] != (mapped ? -1 : op.b + i) || in_use) {
      throw SpecError(std::string(mapped ? "map" : "unmap") + ": slot " + std::to_string(op.a + i) + " shows page " +
                      std::to_string(pages[op.a + i]) + " and has " + std::to_string(slot.users) + " users");
    }
  }
  if (!mapped) b.ready.expect(ceil_div(op.c * page_bytes(), c.block_bytes) + 2);
  const i32 sign = mapped ? 1 : -1;
  for (i64 i = 0; i < op.c; ++i) {
    SlotInfo& slot = c.slots[op.a + i];
    pages[op.a + i] = mapped ? static_cast<i32>(op.b + i) : -1;
    slot.mapped += sign;
    KVMEM_ASSERT(slot.mapped >= 0 && slot.mapped <= static_cast<i32>(c.arenas.size()), "each arena is mapped once");
    if (slot.users == 0) unreferenced_pages_ += sign;
    if (slot.users + slot.cached == 0) empty_pages_ += sign;
  }
  update_backed(b, c, op.a, op.a + op.c);
}

bool PagedBlocks::is_of_reserved(const Blocks& b, const Op& op) const {
  i64 biggest = 0;
  for (const SlotClass& c : b.classes) biggest = std::max(biggest, c.block_bytes);
  return op.a * page_bytes() < kReservedBlocks * biggest;
}

// Updates which of the blocks on slots [from, to) of a class are backed.
void PagedBlocks::update_backed(Blocks& b, const SlotClass& changed, i64 from, i64 to) {
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
    KVMEM_ASSERT(b.info[block].node == kNoNode, "a cached block stays backed");
    if (backed) {
      b.ready.add(block);
    } else {
      b.ready.remove(block);
    }
  }
}

void PagedBlocks::begin_backing(i64 group, i64 first, i64 end) {
  KVMEM_ASSERT(first < end, "there are blocks");
  for (SlotClass& c : blocks_[group].classes) {
    KVMEM_ASSERT(c.backing_to == 0, "one run is mapped at a time");
    c.backing_from = first_slot(c, first), c.backing_to = end_slot(c, end - 1);
  }
}

void PagedBlocks::end_backing(i64 group) {
  for (SlotClass& c : blocks_[group].classes) c.backing_from = c.backing_to = 0;
}

}  // namespace kvmem
