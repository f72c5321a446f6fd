// Gives up first the block from which the fewest hits are to be expected for the memory it takes (its hit density, as
// in LHD, Beckmann, Chen and Cidon, NSDI 2018), leaves of the cached tree only. ReuseStatistics learns what to expect
// from how often a block was used and how long ago; docs/eviction.md says why these two.
//
// Every released leaf stands in the list of its cell, the longest unused first, and wanders to the next cell as it
// ages. Released blocks with cached children wait in a list of their own: without them nothing behind could be found.

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <vector>

#include "eviction_ghosts.h"
#include "eviction_lists.h"
#include "eviction_policies.h"
#include "eviction_statistics.h"

namespace kvmem {
namespace {

constexpr i32 kCells = ReuseStatistics::kCells;
constexpr i32 kInner = kCells;  // the list of released blocks with cached children
// A block is remembered until twice as many others have left as there are ids. A small cache gives up most blocks
// before they could be used again, and learns only from ghosts: 16,384 of them take 0.4 MB.
constexpr i64 kGhostsPerId = 2, kLeastGhosts = 16384;
constexpr i32 kAgedPerTick = 2;  // lists looked at for blocks that have come of the next age
// The order of the cells is computed anew while a sixteenth of the blocks comes and goes. It takes some 30 us.
constexpr i64 kLearnsPerIds = 16, kLeastTicks = 1024;
// Half of what was seen is forgotten while as many blocks are used as are remembered, cached or not: long enough to be
// sure, short enough to follow a shift.
constexpr double kHalfLife = 1;

struct Block {
  i64 released = 0;  // the clock when its life began
  i32 uses = 0;
  i32 children = 0;   // cached ones; they may outlive this block's own life in the cache
  bool open = false;  // its life has begun and no hit has ended it
  bool evictable = false;
};

class DensityPolicy final : public EvictionPolicy {
 public:
  DensityPolicy() { rank_cells(); }

  void reserve(i64 ids) override;
  void insert(i32 id, std::uint64_t key, i32 parent) override;
  void hit(i32 id) override;
  void use(i32 id) override;
  void release(i32 id) override;
  i32 victim() override;
  void evict(i32 id, std::uint64_t key, i32 parent) override;
  void restore(i32 id, std::uint64_t key, i32 parent) override;

 private:
  Block& at(i32 id) { return blocks_[static_cast<std::size_t>(id)]; }
  i32 cell_of(const Block& block) const { return ReuseStatistics::cell_of(block.uses, clock_ - block.released); }
  bool youngest_first(i32 cell) const;

  void push_back(i32 list, i32 id);
  void push_front(i32 list, i32 id);
  void remove(i32 id);
  void mark(i32 list, bool filled);

  void tick();
  void age_lists();
  void learn();
  void rank_cells();
  void begin_life(Block& block);
  i64 begun(const Ghost& ghost) const { return clock_ - (static_cast<std::uint32_t>(clock_) - ghost.released); }

  i64 clock_ = 0;  // blocks inserted or hit
  std::vector<Block> blocks_;
  Ghosts ghosts_;
  ReuseStatistics statistics_;
  IdLists lists_{kCells + 1};
  i64 learned_ = 0, learns_after_ = kLeastTicks;  // the clock of the latest learn(), and ticks from one to the next
  i32 aged_ = 0;                                  // the cell whose list age_lists() looks at next
  // Cells in the order in which they are given up, and which of them hold a block: the victim is the first bit.
  std::array<i32, kCells> order_, rank_;
  std::array<std::uint64_t, (kCells + 63) / 64> filled_{};
};

void DensityPolicy::reserve(i64 ids) {
  if (ids <= static_cast<i64>(blocks_.size())) return;
  blocks_.resize(static_cast<std::size_t>(ids));
  lists_.reserve(ids);
  ghosts_.resize(std::max(kGhostsPerId * ids, kLeastGhosts));
  learns_after_ = std::max(ids / kLearnsPerIds, kLeastTicks);
}

void DensityPolicy::insert(i32 id, std::uint64_t key, i32 parent) {
  tick();
  Block& block = at(id);
  block.open = false;
  block.uses = 1;
  const Ghost ghost = ghosts_.take(key);
  if (ghost.uses) {
    statistics_.used_again(ghost.uses, begun(ghost), clock_);
    block.uses += ghost.uses;
  }
  if (parent >= 0 && at(parent).children++ == 0 && at(parent).evictable) {
    remove(parent);
    push_back(kInner, parent);
  }
}

void DensityPolicy::hit(i32 id) {
  tick();
  Block& block = at(id);
  if (block.open) statistics_.used_again(block.uses, block.released, clock_);
  block.open = false;
  ++block.uses;
}

void DensityPolicy::use(i32 id) {
  remove(id);
  at(id).evictable = false;
}

void DensityPolicy::release(i32 id) {
  Block& block = at(id);
  if (block.open) statistics_.lost_sight(block.uses, block.released, clock_);  // it was used, but nobody had found it
  begin_life(block);
  block.evictable = true;
  push_back(block.children ? kInner : cell_of(block), id);
}

i32 DensityPolicy::victim() {
  for (std::size_t word = 0; word < filled_.size(); ++word) {
    if (filled_[word] == 0) continue;
    const i32 rank = static_cast<i32>(64 * word) + __builtin_ctzll(filled_[word]);
    const i32 cell = order_[static_cast<std::size_t>(rank)];
    return youngest_first(cell) ? lists_.back(cell) : lists_.front(cell);
  }
  return lists_.empty(kInner) ? -1 : lists_.front(kInner);
}

void DensityPolicy::evict(i32 id, std::uint64_t key, i32 parent) {
  Block& block = at(id);
  remove(id);
  block.evictable = false;
  if (!block.open) begin_life(block);
  const Ghost lost = ghosts_.remember(key, static_cast<std::uint32_t>(block.released), block.uses);
  if (lost.uses) statistics_.lost_sight(lost.uses, begun(lost), clock_);
  if (parent < 0 || --at(parent).children > 0 || !at(parent).evictable) return;
  remove(parent);
  push_front(cell_of(at(parent)), parent);  // at least as long unused as those that came there by themselves
}

void DensityPolicy::restore(i32 id, std::uint64_t key, i32 parent) {
  Block& block = at(id);
  if (!ghosts_.take_back(key)) begin_life(block);
  if (parent >= 0 && at(parent).children++ == 0 && at(parent).evictable) {
    remove(parent);
    push_front(kInner, parent);
  }
  block.evictable = true;
  if (lists_.undo_remove(id)) {
    const i32 alone = lists_.alone_in(id);
    if (alone >= 0) mark(alone, true);
    return;
  }
  const i32 list = block.children ? kInner : cell_of(block);
  list != kInner&& youngest_first(list) ? push_back(list, id) : push_front(list, id);
}

// Blocks whose use draws nearer (a loop larger than the cache) are worth more the longer ago they were used.
bool DensityPolicy::youngest_first(i32 cell) const {
  return (cell + 1) % ReuseStatistics::kAges != 0 && statistics_.density(cell + 1) > statistics_.density(cell);
}

void DensityPolicy::push_back(i32 list, i32 id) {
  lists_.push_back(list, id);
  mark(list, true);
}

void DensityPolicy::push_front(i32 list, i32 id) {
  lists_.push_front(list, id);
  mark(list, true);
}

void DensityPolicy::remove(i32 id) {
  const i32 emptied = lists_.remove(id);
  if (emptied >= 0) mark(emptied, false);
}

void DensityPolicy::mark(i32 list, bool filled) {
  if (list == kInner) return;
  const std::size_t rank = static_cast<std::size_t>(rank_[static_cast<std::size_t>(list)]);
  const std::uint64_t bit = std::uint64_t{1} << (rank % 64);
  filled_[rank / 64] = filled ? filled_[rank / 64] | bit : filled_[rank / 64] & ~bit;
}

// Time goes by one block. All work that is not a single call's own is done here, a little each time.
void DensityPolicy::tick() {
  ++clock_;
  age_lists();
  if (clock_ - learned_ >= learns_after_) learn();
}

void DensityPolicy::age_lists() {
  for (i32 i = 0; i < kAgedPerTick; ++i) {
    const i32 cell = aged_;
    aged_ = (aged_ + 1) % kCells;
    while (!lists_.empty(cell)) {
      const i32 id = lists_.front(cell);
      if (ReuseStatistics::age_index(clock_ - at(id).released) <= cell % ReuseStatistics::kAges) break;
      remove(id);
      push_back(cell_of(at(id)), id);
    }
  }
}

void DensityPolicy::begin_life(Block& block) {
  block.open = true;
  block.released = clock_;
  statistics_.begin(block.uses, clock_);
}

void DensityPolicy::learn() {
  const double remembered = static_cast<double>(blocks_.size()) + static_cast<double>(ghosts_.size());
  statistics_.learn(clock_, std::exp2(static_cast<double>(learned_ - clock_) / (kHalfLife * remembered)));
  learned_ = clock_;
  rank_cells();
}

void DensityPolicy::rank_cells() {
  std::iota(order_.begin(), order_.end(), 0);
  std::sort(order_.begin(), order_.end(), [this](i32 a, i32 b) {
    const double x = statistics_.density(a), y = statistics_.density(b);
    return x != y ? x < y : a < b;
  });
  filled_ = {};
  for (i32 rank = 0; rank < kCells; ++rank) {
    const i32 cell = order_[static_cast<std::size_t>(rank)];
    rank_[static_cast<std::size_t>(cell)] = rank;
    if (!lists_.empty(cell)) mark(cell, true);
  }
}

}  // namespace

std::unique_ptr<EvictionPolicy> make_density_policy() { return std::make_unique<DensityPolicy>(); }

}  // namespace kvmem
