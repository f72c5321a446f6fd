// The paged backend (PagedAttention): a sequence is a list of blocks, which kernels read.
//
// The arena is reserved addresses; only pages under blocks in use are backed. So a block is
//   unbacked    some page under it is not mapped;
//   ready       backed, and nobody refers to it: in the intrusive free list (most recently freed first);
//   referenced  refs > 0 table entries (invariants 2 and 3).
// Blocks and pages need not divide each other. Arenas of a group whose tokens have equal size are mapped in lockstep
// and share their bookkeeping: one Class.

#include <algorithm>
#include <cstdlib>

#include "page_table.h"
#include "shared_parts.h"

namespace kvmem {
namespace {

struct Class {
  i64 block_bytes = 0;
  std::vector<i64> arenas;         // numbers within the table
  std::vector<i32> mapped;         // per slot: in how many of the arenas it is mapped (all or none, between calls)
  std::vector<i32> users;          // per slot: referenced blocks that touch it
  i64 hold_from = 0, hold_to = 0;  // slots being prepared at this moment: not to be spilled
};

struct Blocks {
  i64 max_blocks = 0, tokens = 0, per_sequence = 0;
  std::vector<i32> refs;
  std::vector<i32> next, previous;  // the list of ready blocks, circular through entry max_blocks
  std::vector<std::uint8_t> backed;
  std::vector<Class> classes;
  i64 ready = 0;
  i64 cursor = kTrashBlocks;  // no unbacked block lies below
  i64 extra_refs = 0;         // references beyond the first, all blocks
  i64 fence = 0;              // the device may use freed blocks until it has passed
  std::unique_ptr<i32[], void (*)(void*)> table{nullptr, std::free};  // [sequence][per_sequence], 0 is none
};

class PagedTable final : public PageTable {
 public:
  PagedTable(const Geometry& geometry, PagePool& pool, const Sequences& sequences)
      : geometry_(geometry), pool_(pool), sequences_(sequences), groups_(static_cast<i64>(geometry.groups.size())) {
    limit_pages = pool.budget_pages();
    pool.add_owner(this);
    try {
      for (const GroupGeometry& group : geometry.groups) add_group(group);
    } catch (...) {
      pool.remove_owner(this, {});
      throw;
    }
    first_.push_back(static_cast<i64>(pages_.size()));
    copy_tail_.assign(geometry.max_sequences * groups_, 0);
  }

  ~PagedTable() override {
    std::vector<i32> mapped;
    for (const std::vector<i32>& arena : pages_) {
      for (i32 page : arena) {
        if (page >= 0) mapped.push_back(page);
      }
    }
    pool_.remove_owner(this, mapped);
  }

  bool has_room(i64 index, i64 group, i64 tokens) override {
    const Blocks& b = blocks_[group];
    return !copy_tail_[index * groups_ + group] &&
           ceil_div(tokens, b.tokens) <= ceil_div(sequences_.tokens(index, group), b.tokens);
  }

  void grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override {
    const Blocks& b = blocks_[group];
    if (copy_tail_[index * groups_ + group]) copy_tail(index, group, old_tokens, tx);
    const i64 end = ceil_div(new_tokens, b.tokens);
    for (i64 ordinal = ceil_div(old_tokens, b.tokens); ordinal < end; ++ordinal) {
      set(index, group, ordinal, take(group, end - ordinal, tx), tx);
    }
  }

  void shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override {
    Blocks& b = blocks_[group];
    for (i64 ordinal = ceil_div(old_tokens, b.tokens); ordinal-- > ceil_div(new_tokens, b.tokens);) {
      b.fence = tx.fence();
      set(index, group, ordinal, 0, tx);
    }
    // The block that the length now cuts is copied when the sequence next grows, so that truncating needs no memory.
    if (new_tokens % b.tokens != 0 && b.refs[entry(index, group, new_tokens / b.tokens)] > 1) {
      copy_tail_[index * groups_ + group] = 1;
    }
  }

  void drop_front(i64 index, i64 group, i64 old_first, i64 first, Transaction& tx) override {
    Blocks& b = blocks_[group];
    if (first / b.tokens == old_first / b.tokens) return;
    b.fence = tx.fence();
    for (i64 ordinal = old_first / b.tokens; ordinal < first / b.tokens; ++ordinal) set(index, group, ordinal, 0, tx);
  }

  void share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) override {
    const Blocks& b = blocks_[group];
    const i64 whole = tokens / b.tokens;
    for (i64 ordinal = first / b.tokens; ordinal < whole; ++ordinal) {
      set(child, group, ordinal, entry(parent, group, ordinal), tx);
    }
    const i64 tail = tokens % b.tokens;
    if (tail == 0) return;
    const i64 fresh = take(group, 1, tx);
    set(child, group, whole, fresh, tx);
    copy_block(group, entry(parent, group, whole), fresh, tail, tx);
  }

  void close(i64 index, Transaction& tx) override {
    for (i64 g = 0; g < groups_; ++g) {
      Blocks& b = blocks_[g];  // copy_tail_ stays: it only asks to look, and this may yet be taken back
      if (sequences_.tokens(index, g) == 0) continue;
      b.fence = tx.fence();
      // Last block first: the free list then gives them out again in ascending order.
      const i64 first = sequences_.front(index, g) / b.tokens;
      for (i64 ordinal = ceil_div(sequences_.tokens(index, g), b.tokens); ordinal-- > first;)
        set(index, g, ordinal, 0, tx);
    }
  }

  void back_trash(i64 group, Transaction& tx) override {
    if (!has_trash(group)) back(group, 0, kTrashBlocks, Zero::always, tx);
  }
  bool has_trash(i64 group) const override {
    return blocks_[group].backed[kReadTrash] && blocks_[group].backed[kWriteTrash];
  }

  void look_at_tail(i64 index, i64 group) override { copy_tail_[index * groups_ + group] = 1; }

  bool is_whole(const Op& op) const override {
    const i64 a = op.at - base_arena_;
    if (a < 0 || a >= static_cast<i64>(pages_.size())) return true;  // a neighbour's
    const Class& c = class_of(a);
    for (i64 slot = op.a; slot < op.a + op.c; ++slot) {
      if (c.mapped[slot] != 0 && c.mapped[slot] != static_cast<i32>(c.arenas.size())) return false;
    }
    return true;
  }

  bool holds(i64 index, i64 group) const override {
    const Blocks& b = blocks_[group];
    const i64 first = sequences_.front(index, group) / b.tokens;
    const i64 end = ceil_div(sequences_.tokens(index, group), b.tokens);
    for (i64 ordinal = 0; ordinal < b.per_sequence; ++ordinal) {
      if ((entry(index, group, ordinal) != 0) != (ordinal >= first && ordinal < end)) return false;
    }
    return true;
  }

  // Blocks are taken from backed pages as long as there are any, which costs nothing; there is nothing to prepare.
  bool map_ahead(i64, i64, i64, Transaction&) override { return false; }
  void set_pending(i64, i64) override {}
  i64 pending(i64) const override { return 0; }

  void apply(const Op& op) override {
    if (op.kind != OpKind::block) throw SpecError("bind: the paged backend has no rows");
    const i64 index = sequences_.index(op.a);
    if (op.at < 0 || op.at >= groups_) throw SpecError("block: no group " + std::to_string(op.at));
    Blocks& b = blocks_[op.at];
    if (op.b < 0 || op.b >= b.per_sequence) throw SpecError("block: no entry " + std::to_string(op.b));
    i32& place = b.table[index * b.per_sequence + op.b];
    const bool valid = op.c == 0 || (op.c >= kTrashBlocks && op.c < b.max_blocks && b.backed[op.c]);
    if (place != op.d || !valid) {
      throw SpecError("block: entry " + std::to_string(op.b) + " is " + std::to_string(place) + ", not " +
                      std::to_string(op.d) + ", or block " + std::to_string(op.c) + " is not there");
    }
    place = static_cast<i32>(op.c);
    if (op.c != 0) acquire(b, op.c);
    if (op.d != 0) drop(b, op.d);
  }

  bool is_mapped(i32 arena, i64 slot, i64 count) const override {
    const std::vector<i32>& pages = pages_[arena - base_arena_];
    return std::all_of(pages.begin() + slot, pages.begin() + slot + count, [](i32 page) { return page >= 0; });
  }

  void on_map(const Op& op) override { change(op, true); }
  void on_unmap(const Op& op) override { change(op, false); }

  i64 offset_bytes(i64 index, i64 group, i64 a, i64 token) const override {
    const Blocks& b = blocks_[group];
    const i64 bytes = geometry_.groups[group].token_bytes[a];
    return (entry(index, group, token / b.tokens) * b.tokens + token % b.tokens) * bytes;
  }

  Placement place(i64 index, i64 group) const override {
    Placement p;
    p.blocks = &blocks_[group].table[index * blocks_[group].per_sequence];
    return p;
  }

  i64 tokens_that_fit(i64 index, i64 group, i64 pages) const override {
    const Blocks& b = blocks_[group];
    i64 blocks = ceil_div(sequences_.tokens(index, group), b.tokens) + b.ready;
    // Ready blocks lie on parked pages: what is left of the pages backs others, in the order in which take() would.
    i64 left = pages - idle_pages_;
    std::vector<i64> next(b.classes.size(), 0);  // slots before it have been counted
    for (i64 block = b.cursor; block < b.max_blocks && blocks * b.tokens < geometry_.groups[group].max_tokens;
         ++block) {
      if (b.backed[block]) continue;
      for (std::size_t k = 0; k < b.classes.size(); ++k) {
        const Class& c = b.classes[k];
        for (i64 slot = std::max(first_slot(c, block), next[k]); slot < end_slot(c, block); ++slot) {
          if (c.mapped[slot] == 0) left -= static_cast<i64>(c.arenas.size());
        }
        next[k] = end_slot(c, block);
      }
      if (left < 0) break;
      ++blocks;
    }
    return std::min(geometry_.groups[group].max_tokens, blocks * b.tokens);
  }

  i64 parked_pages() const override { return idle_pages_; }

  i64 spill(i64 pages, Transaction& tx) override {
    i64 freed = 0;
    if (idle_pages_ == 0) return 0;
    for (Blocks& b : blocks_) {
      for (Class& c : b.classes) {
        const i64 each = static_cast<i64>(c.arenas.size());
        for (i64 slot = static_cast<i64>(c.mapped.size()); slot > 0 && freed < pages;) {
          if (!idle(c, slot - 1)) {
            --slot;
            continue;
          }
          i64 first = slot - 1;
          while (first > 0 && idle(c, first - 1) && freed + each * (slot - first) < pages) --first;
          for (i64 a : c.arenas) unmap(a, first, slot, b.fence, tx);
          freed += each * (slot - first);
          slot = first;
        }
      }
    }
    return freed;
  }

  void count_bytes(i64* used_bytes, i64* shared_bytes) const override {
    *used_bytes = *shared_bytes = 0;
    for (i64 g = 0; g < groups_; ++g) {
      const Blocks& b = blocks_[g];
      i64 token_bytes = 0;
      for (i64 bytes : geometry_.groups[g].token_bytes) token_bytes += bytes;
      i64 tokens = 0;
      std::vector<SharedPart> shared;  // in tokens of a block
      for (i64 index = 0; index < sequences_.capacity(); ++index) {
        const i64 first = sequences_.front(index, g), end = sequences_.tokens(index, g);
        tokens += end - first;
        if (b.extra_refs == 0) continue;
        for (i64 ordinal = first / b.tokens; ordinal * b.tokens < end; ++ordinal) {
          const i32 block = entry(index, g, ordinal);
          if (b.refs[block] <= 1) continue;
          const i64 start = ordinal * b.tokens;
          shared.push_back({block, std::max(first - start, i64{0}), std::min(end - start, b.tokens)});
          tokens -= shared.back().to - shared.back().from;
        }
      }
      const SharedCount count = count_shared(shared);
      *used_bytes += (tokens + count.length) * token_bytes;
      *shared_bytes += count.pieces * b.tokens * token_bytes;
    }
  }

  i64 first_arena(i64 group) const override { return base_arena_ + first_[group]; }

  i64 mapped_extent_slots(i64 group, i64 arena_in_group) const override {
    const std::vector<i32>& pages = pages_[first_[group] + arena_in_group];
    i64 slots = static_cast<i64>(pages.size());
    while (slots > 0 && pages[slots - 1] < 0) --slots;
    return slots;
  }

  void check(std::vector<std::string>* out) const override;

 private:
  i64 page_bytes() const { return geometry_.page_bytes; }
  i32 arena(i64 a) const { return static_cast<i32>(base_arena_ + a); }
  i32 entry(i64 index, i64 g, i64 ordinal) const { return blocks_[g].table[index * blocks_[g].per_sequence + ordinal]; }
  i64 first_slot(const Class& c, i64 block) const { return block * c.block_bytes / page_bytes(); }
  i64 end_slot(const Class& c, i64 block) const { return ceil_div((block + 1) * c.block_bytes, page_bytes()); }

  void add_group(const GroupGeometry& group) {
    Blocks b;
    b.max_blocks = group.max_blocks;
    b.tokens = group.block_tokens;
    b.per_sequence = ceil_div(group.max_tokens, group.block_tokens);
    b.refs.assign(b.max_blocks, 0);
    b.next.assign(b.max_blocks + 1, -1);
    b.previous.assign(b.max_blocks + 1, -1);
    b.next[b.max_blocks] = b.previous[b.max_blocks] = static_cast<i32>(b.max_blocks);
    b.backed.assign(b.max_blocks, 0);
    // calloc: a table for every sequence at full length is large, and mostly never touched
    b.table.reset(static_cast<i32*>(std::calloc(geometry_.max_sequences * b.per_sequence, sizeof(i32))));
    if (!b.table) throw OutOfMemory("no host memory for the block table");
    first_.push_back(static_cast<i64>(pages_.size()));
    for (std::size_t i = 0; i < group.token_bytes.size(); ++i) {
      const i32 arena = pool_.add_arena(this, group.arena_slots[i]);
      if (pages_.empty()) base_arena_ = arena;
      const i64 block_bytes = group.token_bytes[i] * group.block_tokens;
      auto same = std::find_if(b.classes.begin(), b.classes.end(),
                               [&](const Class& c) { return c.block_bytes == block_bytes; });
      if (same == b.classes.end()) {
        Class c;
        c.block_bytes = block_bytes;
        c.mapped.assign(group.arena_slots[i], 0);
        c.users.assign(group.arena_slots[i], 0);
        same = b.classes.insert(b.classes.end(), std::move(c));
      }
      same->arenas.push_back(static_cast<i64>(pages_.size()));
      pages_.emplace_back(group.arena_slots[i], -1);
    }
    for (Class& c : b.classes) {  // the trash blocks are referred to for ever
      for (i64 block = 0; block < kTrashBlocks; ++block) {
        for (i64 slot = first_slot(c, block); slot < end_slot(c, block); ++slot) ++c.users[slot];
      }
    }
    b.refs[kReadTrash] = b.refs[kWriteTrash] = 1;
    blocks_.push_back(std::move(b));
  }

  void set(i64 index, i64 group, i64 ordinal, i64 block, Transaction& tx) {
    const i32 old = entry(index, group, ordinal);
    tx.push({OpKind::block, static_cast<i32>(group), sequences_.handle_of(index), ordinal, block, old});
  }

  // The next ready block. `wanted`: how many the caller will take in all, so that they are backed in one run.
  i64 take(i64 group, i64 wanted, Transaction& tx) {
    Blocks& b = blocks_[group];
    if (b.ready == 0) {
      i64 first = b.cursor;
      while (first < b.max_blocks && b.backed[first]) ++first;
      b.cursor = first;
      if (first == b.max_blocks)
        throw OutOfMemory("all " + std::to_string(first - kTrashBlocks) + " blocks are in use");
      i64 end = first + 1;
      while (end < b.max_blocks && end - first < wanted && !b.backed[end]) ++end;
      back(group, first, end, geometry_.zero, tx);
    }
    const i64 block = b.next[b.max_blocks];
    if (geometry_.zero == Zero::always) {
      for (const Class& c : b.classes) {
        for (i64 a : c.arenas) tx.push({OpKind::zero, arena(a), block * c.block_bytes, c.block_bytes});
      }
    }
    return block;
  }

  // Maps what is not mapped yet under blocks [first, end).
  void back(i64 group, i64 first, i64 end, Zero zero, Transaction& tx) {
    Blocks& b = blocks_[group];
    for (Class& c : b.classes) c.hold_from = first_slot(c, first), c.hold_to = end_slot(c, end - 1);
    try {
      for (Class& c : b.classes) {
        for (i64 slot = c.hold_from; slot < c.hold_to;) {
          i64 n = 0;
          while (slot + n < c.hold_to && c.mapped[slot + n] == 0) ++n;
          for (i64 a : c.arenas) {
            if (n > 0) pool_.map_slots(*this, arena(a), slot, n, slot > 0 ? pages_[a][slot - 1] : -1, zero, tx);
          }
          slot += std::max(n, i64{1});
        }
      }
    } catch (...) {
      for (Class& c : b.classes) c.hold_from = c.hold_to = 0;
      throw;
    }
    for (Class& c : b.classes) c.hold_from = c.hold_to = 0;
  }

  void copy_tail(i64 index, i64 group, i64 tokens, Transaction& tx) {
    const Blocks& b = blocks_[group];
    const i64 ordinal = tokens / b.tokens, tail = tokens % b.tokens;
    const i32 old = tail == 0 ? 0 : entry(index, group, ordinal);
    if (old == 0 || b.refs[old] <= 1) {
      copy_tail_[index * groups_ + group] = 0;  // the other user has gone
      return;
    }
    // The flag stays set, so that a transaction taken back finds it set again; the next call clears it.
    const i64 fresh = take(group, 1, tx);
    set(index, group, ordinal, fresh, tx);
    copy_block(group, old, fresh, tail, tx);
  }

  void copy_block(i64 group, i64 from, i64 to, i64 tokens, Transaction& tx) {
    const Blocks& b = blocks_[group];
    for (const Class& c : b.classes) {
      for (i64 a : c.arenas) {
        tx.push(
            {OpKind::copy, arena(a), to * c.block_bytes, from * c.block_bytes, tokens * (c.block_bytes / b.tokens)});
      }
    }
  }

  void unmap(i64 a, i64 from, i64 to, i64 fence, Transaction& tx) {
    const std::vector<i32>& pages = pages_[a];
    while (from < to) {
      i64 n = 1;
      while (from + n < to && pages[from + n] == pages[from] + n) ++n;
      tx.push({OpKind::unmap, arena(a), from, pages[from], n, fence});
      from += n;
    }
  }

  bool idle(const Class& c, i64 slot) const {
    return c.mapped[slot] > 0 && c.users[slot] == 0 && (slot < c.hold_from || slot >= c.hold_to);
  }

  // --- state ---
  void link(Blocks& b, i64 block, bool front) {
    const i32 head = static_cast<i32>(b.max_blocks), x = static_cast<i32>(block);
    const i32 before = front ? head : b.previous[head];
    const i32 after = b.next[before];
    b.previous[x] = before, b.next[x] = after;
    b.next[before] = b.previous[after] = x;
    ++b.ready;
  }

  void unlink(Blocks& b, i64 block) {
    b.next[b.previous[block]] = b.next[block];
    b.previous[b.next[block]] = b.previous[block];
    --b.ready;
  }

  void acquire(Blocks& b, i64 block) {
    if (b.refs[block]++ > 0) {
      ++b.extra_refs;
      return;
    }
    unlink(b, block);
    for (Class& c : b.classes) {
      for (i64 slot = first_slot(c, block), end = end_slot(c, block); slot < end; ++slot) {
        if (c.users[slot]++ == 0) idle_pages_ -= c.mapped[slot];
      }
    }
  }

  void drop(Blocks& b, i64 block) {
    if (--b.refs[block] > 0) {
      --b.extra_refs;
      return;
    }
    link(b, block, true);
    for (Class& c : b.classes) {
      for (i64 slot = first_slot(c, block), end = end_slot(c, block); slot < end; ++slot) {
        if (--c.users[slot] == 0) idle_pages_ += c.mapped[slot];
      }
    }
  }

  i64 group_of(i64 a) const {
    i64 g = 0;
    while (a >= first_[g + 1]) ++g;
    return g;
  }

  const Class& class_of(i64 a) const {
    const std::vector<Class>& classes = blocks_[group_of(a)].classes;
    return *std::find_if(classes.begin(), classes.end(), [&](const Class& c) {
      return std::find(c.arenas.begin(), c.arenas.end(), a) != c.arenas.end();
    });
  }

  void change(const Op& op, bool mapped) {
    const i64 a = op.at - base_arena_;
    Blocks& b = blocks_[group_of(a)];
    Class& c = const_cast<Class&>(class_of(a));
    std::vector<i32>& pages = pages_[a];
    for (i64 i = 0; i < op.c; ++i) {
      if (pages[op.a + i] != (mapped ? -1 : op.b + i) || (!mapped && c.users[op.a + i] > 0 && !growing(op))) {
        throw SpecError(std::string(mapped ? "map" : "unmap") + ": slot " + std::to_string(op.a + i) + " shows page " +
                        std::to_string(pages[op.a + i]) + " and has " + std::to_string(c.users[op.a + i]) + " users");
      }
    }
    for (i64 i = 0; i < op.c; ++i) {
      const i64 slot = op.a + i;
      pages[slot] = mapped ? static_cast<i32>(op.b + i) : -1;
      c.mapped[slot] += mapped ? 1 : -1;
      if (c.users[slot] == 0) idle_pages_ += mapped ? 1 : -1;
    }
    refresh(b, c, op.a, op.a + op.c);
  }

  // Trash slots have users before they are mapped; taking such a mapping back must be possible.
  bool growing(const Op& op) const { return op.a * page_bytes() < kTrashBlocks * biggest_block(op.at - base_arena_); }
  i64 biggest_block(i64 a) const {
    i64 g = 0;
    while (a >= first_[g + 1]) ++g;
    i64 bytes = 0;
    for (const Class& c : blocks_[g].classes) bytes = std::max(bytes, c.block_bytes);
    return bytes;
  }

  // Which blocks over the slots [from, to) of a class are backed now?
  void refresh(Blocks& b, const Class& changed, i64 from, i64 to) {
    const i64 first = from * page_bytes() / changed.block_bytes;
    const i64 end = std::min(b.max_blocks, ceil_div(to * page_bytes(), changed.block_bytes));
    for (i64 block = first; block < end; ++block) {
      bool backed = true;
      for (const Class& c : b.classes) {
        for (i64 slot = first_slot(c, block); backed && slot < end_slot(c, block); ++slot) {
          backed = c.mapped[slot] == static_cast<i32>(c.arenas.size());
        }
      }
      if (backed == (b.backed[block] != 0)) continue;
      b.backed[block] = backed;
      if (!backed) b.cursor = std::min(b.cursor, std::max(block, kTrashBlocks));
      if (b.refs[block] > 0) continue;
      if (backed) {
        link(b, block, false);
      } else {
        unlink(b, block);
      }
    }
  }

  const Geometry& geometry_;
  PagePool& pool_;
  const Sequences& sequences_;
  const i64 groups_;
  i32 base_arena_ = 0;
  std::vector<i64> first_;               // first arena of each group, and one past the last
  std::vector<Blocks> blocks_;           // by group
  std::vector<std::vector<i32>> pages_;  // [arena][slot], -1 where nothing is mapped
  std::vector<std::uint8_t> copy_tail_;  // [sequence][group]: look whether the tail block is shared before writing
  i64 idle_pages_ = 0;                   // mapped, but under no referenced block
};

void PagedTable::check(std::vector<std::string>* out) const {
  i64 idle = 0, distinct = 0;
  for (i64 g = 0; g < groups_; ++g) {
    const Blocks& b = blocks_[g];
    const auto say = [&](i64 block, const std::string& what) {
      out->push_back("group " + std::to_string(g) + ", block " + std::to_string(block) + ": " + what);
    };
    std::vector<i32> refs(b.max_blocks, 0);
    refs[kReadTrash] = refs[kWriteTrash] = 1;
    for (i64 index = 0; index < sequences_.capacity(); ++index) {
      const i64 first = sequences_.front(index, g) / b.tokens, end = ceil_div(sequences_.tokens(index, g), b.tokens);
      for (i64 ordinal = 0; ordinal < std::min(end + 2, b.per_sequence); ++ordinal) {
        const i32 block = entry(index, g, ordinal);
        if ((block != 0) != (ordinal >= first && ordinal < end)) {
          out->push_back("sequence " + std::to_string(sequences_.handle_of(index)) + ": table entry " +
                         std::to_string(ordinal) + " is " + std::to_string(block));
        }
        if (block != 0) ++refs[block];
      }
    }
    i64 ready = 0;
    for (i64 x = b.next[b.max_blocks]; x != b.max_blocks && ready <= b.max_blocks; x = b.next[x], ++ready) {
      if (b.refs[x] != 0 || !b.backed[x]) say(x, "invariant 2: in the free list, yet referenced or not backed");
    }
    if (ready != b.ready)
      say(-1, "invariant 2: the free list has " + std::to_string(ready) + " entries, not " + std::to_string(b.ready));
    for (i64 block = 0; block < b.max_blocks; ++block) {
      if (refs[block] != b.refs[block]) {
        say(block,
            "invariant 3: " + std::to_string(refs[block]) + " table entries, counted " + std::to_string(b.refs[block]));
      }
      if (block >= kTrashBlocks && refs[block] > 0 && !b.backed[block]) say(block, "in use, but not backed");
    }
    for (const Class& c : b.classes) {
      std::vector<i32> users(c.users.size(), 0);
      for (i64 block = 0; block < b.max_blocks; ++block) {
        if (refs[block] == 0) continue;
        for (i64 slot = first_slot(c, block); slot < end_slot(c, block); ++slot) ++users[slot];
      }
      for (i64 slot = 0; slot < static_cast<i64>(users.size()); ++slot) {
        if (users[slot] != c.users[slot]) say(-1, "slot " + std::to_string(slot) + " has a wrong count of users");
        if (c.mapped[slot] != 0 && c.mapped[slot] != static_cast<i32>(c.arenas.size())) say(-1, "arenas out of step");
        if (users[slot] == 0) idle += c.mapped[slot];
        distinct += c.mapped[slot];
      }
    }
  }
  if (idle != idle_pages_)
    out->push_back("invariant 1: " + std::to_string(idle) + " idle pages, counted " + std::to_string(idle_pages_));
  if (distinct != owned_pages)
    out->push_back("invariant 1: " + std::to_string(distinct) + " pages mapped, counted " +
                   std::to_string(owned_pages));
}

}  // namespace

std::unique_ptr<PageTable> make_paged_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences) {
  return std::make_unique<PagedTable>(geometry, pool, sequences);
}

}  // namespace kvmem
