// Compaction: moving blocks together, so that whole pages become empty. Pages are mapped and unmapped whole, but
// sequences that begin and end in any order leave free blocks on most of them.
//
// A block moves once, and only to a page that stays in use. So each emptied page is a gain, and no copy reads what
// another one wrote. Referenced blocks move only to pages with referenced blocks, because a page of cached blocks can
// be reclaimed without any copy. The plan depends on the metadata alone, so that it can be repeated.

#include <algorithm>
#include <functional>
#include <utility>

#include "table/paged/paged_table.h"

namespace kvmem {
namespace {

std::vector<i32> all(const ReadyBlocks& ready) {
  std::vector<i32> blocks(ready.size());
  ready.copy(ready.size(), blocks.data());
  return blocks;
}

// Decides which blocks of a group move where, on a copy of the counts.
class Plan {
 public:
  Plan(const PagedBlocks& blocks, i64 group, i64 page_bytes)
      : blocks_(blocks), b_(blocks[group]), page_bytes_(page_bytes), leaves_(b_.max_blocks), taken_(b_.max_blocks) {
    for (const SlotClass& c : b_.classes) {
      Use use;
      for (const SlotInfo& slot : c.slots)
        use.users.push_back(slot.users), use.live.push_back(slot.users + slot.cached);
      use.receives.resize(c.slots.size());
      uses_.push_back(std::move(use));
    }
  }

  // Empties pages, those with the fewest blocks first, until `pages` are empty; returns how many are.
  i64 run(i64 pages) {
    for (std::size_t k = 0; k < uses_.size() && emptied_ < pages; ++k) {
      find_room(k);
      if (room_.empty()) continue;
      for (i64 slot : fewest_first(k)) {
        if (emptied_ >= pages) break;
        empty(k, slot);
      }
    }
    return emptied_;
  }

  std::vector<BlockMove> moves() {
    std::sort(moves_.begin(), moves_.end(), [](const BlockMove& a, const BlockMove& b) { return a.from < b.from; });
    return moves_;
  }

 private:
  // By slot of a class: its referenced blocks, its referenced and cached ones, and whether a block moves there.
  struct Use {
    std::vector<i32> users, live;
    std::vector<std::uint8_t> receives;
  };

  bool live(i64 block) const { return (b_.info[block].refs > 0 || b_.info[block].node != kNoNode) && !leaves_[block]; }

  // Counts a block on its pages, once more (+1) or less (-1).
  void count(i64 block, bool referenced, i32 sign) {
    for (std::size_t k = 0; k < uses_.size(); ++k) {
      const SlotClass& c = b_.classes[k];
      for (i64 slot = blocks_.first_slot(c, block); slot < blocks_.end_slot(c, block); ++slot) {
        i32& live = uses_[k].live[slot];
        live += sign;
        if (live == 0 || (live == 1 && sign > 0)) emptied_ -= sign * static_cast<i64>(c.arenas.size());
        if (referenced) uses_[k].users[slot] += sign;
      }
    }
  }

  // Whether all pages of a ready block are in use by other blocks.
  bool has_neighbours(i64 block, bool referenced) const {
    for (std::size_t k = 0; k < uses_.size(); ++k) {
      const SlotClass& c = b_.classes[k];
      const std::vector<i32>& use = referenced ? uses_[k].users : uses_[k].live;
      for (i64 slot = blocks_.first_slot(c, block); slot < blocks_.end_slot(c, block); ++slot) {
        if (use[slot] == 0) return false;
      }
    }
    return true;
  }

  // Finds the ready blocks to which others may move, those on the fullest pages first.
  void find_room(std::size_t k) {
    room_.clear();
    for (i32 block : all(b_.ready)) {
      if (!taken_[block] && has_neighbours(block, false)) room_.push_back(block);
    }
    const auto key = [&](i32 block) {
      return std::make_pair(-uses_[k].live[blocks_.first_slot(b_.classes[k], block)], block);
    };
    std::sort(room_.begin(), room_.end(), [&](i32 x, i32 y) { return key(x) < key(y); });
    next_room_[0] = next_room_[1] = 0;
  }

  std::vector<i64> fewest_first(std::size_t k) const {
    const std::vector<i32>& live = uses_[k].live;
    std::vector<i64> slots;
    for (i64 slot = 0; slot < static_cast<i64>(live.size()); ++slot) {
      if (live[slot] > 0) slots.push_back(slot);
    }
    std::sort(slots.begin(), slots.end(),
              [&](i64 x, i64 y) { return std::make_pair(live[x], -x) < std::make_pair(live[y], -y); });
    return slots;
  }

  // Returns a block to move to, or -1. One that is refused now is never tried again: pages in use only become fewer.
  i64 take_room(bool referenced) {
    for (std::size_t& at = next_room_[referenced]; at < room_.size(); ++at) {
      const i32 block = room_[at];
      if (taken_[block] || !has_neighbours(block, referenced)) continue;
      taken_[block] = 1;
      count(block, referenced, 1);
      return block;
    }
    return -1;
  }

  // Moves all blocks away from a page, or none.
  void empty(std::size_t k, i64 slot) {
    const SlotClass& c = b_.classes[k];
    if (uses_[k].receives[slot]) return;
    leaving_.clear();
    const i64 end = std::min(b_.max_blocks, ceil_div((slot + 1) * page_bytes_, c.block_bytes));
    for (i64 block = slot * page_bytes_ / c.block_bytes; block < end; ++block) {
      if (live(block)) leaving_.push_back(block);
    }
    if (leaving_.empty() || leaving_.front() < kReservedBlocks) return;
    for (i64 block : leaving_) count(block, b_.info[block].refs > 0, -1);
    std::vector<BlockMove> found;
    for (i64 block : leaving_) {
      const i64 to = take_room(b_.info[block].refs > 0);
      if (to < 0) return put_back(found);
      found.push_back({static_cast<i32>(block), static_cast<i32>(to)});
    }
    for (const BlockMove& move : found) settle(move);
  }

  void put_back(const std::vector<BlockMove>& found) {
    for (const BlockMove& move : found) {
      taken_[move.to] = 0;
      count(move.to, b_.info[move.from].refs > 0, -1);
    }
    for (i64 block : leaving_) count(block, b_.info[block].refs > 0, 1);
  }

  void settle(const BlockMove& move) {
    leaves_[move.from] = 1;
    moves_.push_back(move);
    for (std::size_t k = 0; k < uses_.size(); ++k) {
      const SlotClass& c = b_.classes[k];
      for (i64 slot = blocks_.first_slot(c, move.to); slot < blocks_.end_slot(c, move.to); ++slot)
        uses_[k].receives[slot] = 1;
    }
  }

  const PagedBlocks& blocks_;
  const Blocks& b_;
  const i64 page_bytes_;
  std::vector<Use> uses_;                     // by class
  std::vector<std::uint8_t> leaves_, taken_;  // by block: it moves; another moves there
  std::vector<i32> room_;
  std::size_t next_room_[2] = {0, 0};  // for cached and for referenced blocks
  std::vector<i64> leaving_;           // the blocks of the page that is being emptied
  std::vector<BlockMove> moves_;
  i64 emptied_ = 0;
};

}  // namespace

i64 PagedTable::compact(i64 pages, Transaction& tx) {
  i64 emptied = 0;
  if (append_only_) return 0;  // a moved block is another table entry
  for (i64 g = 0; g < groups_ && emptied < pages; ++g) {
    Plan plan(blocks_, g, page_bytes());
    emptied += plan.run(pages - emptied);
    if (const std::vector<BlockMove> moves = plan.moves(); !moves.empty()) move(g, moves, tx);
  }
  return emptied;
}

// REQUIRES: `moves` is sorted by `from`, so that neighbours that stay neighbours are copied together.
void PagedTable::move(i64 g, const std::vector<BlockMove>& moves, Transaction& tx) {
  const Blocks& b = blocks_[g];
  std::vector<i32> now(b.max_blocks, 0);
  for (const SlotClass& c : b.classes) {
    for (i64 a : c.arenas) {
      for (const BlockMove& move : moves) {
        tx.push({OpKind::copy, arena(a), move.to * c.block_bytes, move.from * c.block_bytes, c.block_bytes});
      }
    }
  }
  for (const BlockMove& move : moves) {
    now[move.from] = move.to;
    if (const i32 node = b.info[move.from].node; node != kNoNode) {
      tx.push({OpKind::shift, number, node, g, move.to, move.from});
    }
  }
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    if (!sequences_.live(index)) continue;
    const i64 end = ceil_div(sequences_.tokens(index, g), b.tokens);
    for (i64 ordinal = sequences_.front(index, g) / b.tokens; ordinal < end; ++ordinal) {
      const i32 old = blocks_.entry(index, g, ordinal);
      if (now[old] == 0) continue;
      tx.push({OpKind::block, static_cast<i32>(g), sequences_.handle_of(index), ordinal, now[old], old});
    }
  }
  blocks_.set_fence(g, tx.new_fence());  // the copies still read the old blocks
  blocks_.defer_empty_pages(g);
}

}  // namespace kvmem
