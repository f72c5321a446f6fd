// Gives up first the block from which the fewest hits are to be expected for the memory it takes (its hit density, as
// in LHD, Beckmann, Chen and Cidon, NSDI 2018), leaves of the cached tree only. ReuseStatistics learns what to expect
// from how often a block was used and how long ago; docs/eviction.md says why these two.
//
// Every released leaf stands in the list of its cell, the longest unused first, and wanders to the next cell as it
// ages. Released blocks with cached children stand in none: without them nothing behind could be found, so each has
// its turn when the last of its children has gone. A call touches the 16 bytes of its block, of its parent and of its
// neighbours in the list, and one set of ghosts; a sequence's end, one list.

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "base/id_lists.h"
#include "eviction/ghosts.h"
#include "eviction/policy.h"
#include "eviction/statistics.h"

namespace kvmem {
namespace {

constexpr i32 kClasses = ReuseStatistics::kClasses, kAges = ReuseStatistics::kAges, kCells = ReuseStatistics::kCells;
// Of blocks that left, about twice as many are remembered as there are ids. A small cache gives up most blocks before
// they could be used again, and learns only from ghosts: 16,384 of them take 128 KiB.
constexpr i64 kGhostsPerId = 2, kLeastGhosts = 16384;
// The densities are computed anew while a sixteenth of the blocks comes and goes: some 9 us in all, in parts.
constexpr i64 kLearnsPerIds = 16, kLeastTicks = 1024;
// Half of what was seen is forgotten while as many blocks are used as are remembered, cached or not: long enough to be
// sure, short enough to follow a shift.
constexpr double kHalfLife = 1;
// Work that is not a call's own is done at every 16th tick, one chore at a time. 16 chores are a turn: one for the
// lists of each class, the others for learning.
constexpr i32 kChoreBits = ReuseStatistics::kTickBits, kTurnBits = 4;
static_assert(kClasses < 1 << kTurnBits);
constexpr i32 kMovesPerChore = 128;  // blocks that come of the next age; a chore that has more goes on at the next
constexpr i32 kMostUses = 255, kMostChildren = (1 << 22) - 1;  // then counted no further
constexpr float kNone = std::numeric_limits<float>::infinity();

struct Block : IdNode {
  Block() : uses(0), children(0), open(0), evictable(0) {}

  std::uint32_t begun = 0;  // lower half of the clock when its life began
  std::uint32_t uses : 8;
  std::uint32_t children : 22;  // cached ones; where a window passed, they may be there before and after this block
  std::uint32_t open : 1;       // its life has begun and no hit has ended it
  std::uint32_t evictable : 1;
};
static_assert(sizeof(Block) == 16);

class DensityPolicy final : public EvictionPolicy {
 public:
  DensityPolicy() { least_.fill(kNone); }

  void reserve(i64 ids) override;
  void insert(i32 id, std::uint64_t key, i32 parent) override;
  void undo_insert(i32 id, std::uint64_t key, i32 parent) override;
  void expect(i32 id, std::uint64_t key) override {
    ghosts_.prefetch(key);
    __builtin_prefetch(&blocks_[id], 1);
  }
  void prefetch(i32 id) const override { __builtin_prefetch(&blocks_[id], 1); }
  void hit(i32 id) override;
  void use(i32 id) override;
  void undo_use(i32 id) override;
  void release(i32 id) override;
  void undo_release(i32 id) override;
  i64 aged() const override { return clock_ >> kChoreBits; }
  i32 victim() override;
  void evict(i32 id, std::uint64_t key, i32 parent) override;
  void restore(i32 id, std::uint64_t key, i32 parent) override;
  void digest(Hasher& hash) const override {
    for (i32 cell = 0; cell < kCells; ++cell) blocks_.digest(cell, hash);
  }

 private:
  static constexpr std::size_t at(i32 index) { return static_cast<std::size_t>(index); }
  i64 begun(std::uint32_t clock) const { return clock_ - (static_cast<std::uint32_t>(clock_) - clock); }
  i32 cell_of(const Block& block) const { return ReuseStatistics::cell_of(block.uses, clock_ - begun(block.begun)); }
  bool youngest_first(i32 cell) const;

  void push_back(i32 list, i32 id);
  void push_front(i32 list, i32 id);
  void remove(i32 id);
  void take_back_push(i32 id);
  void put_back(i32 id);
  void mark(i32 list, bool filled);
  void find_least(i32 cls);

  void add_child(i32 parent, bool undo = false);
  bool drop_child(i32 parent, bool undo = false);
  i32 any_released();
  void begin_life(Block* block);
  void lose(const Ghost& ghost);

  void tick() {
    if ((++clock_ & ((1 << kChoreBits) - 1)) == 0) do_chore();
  }
  void do_chore();
  void age_lists();
  void learn();

  i64 clock_ = 0;  // blocks inserted or hit: time goes by one block
  IdLists<Block> blocks_{kCells};
  Ghosts ghosts_;
  ReuseStatistics statistics_;
  // By class: the ages of which there is a block, and of their cells that of the least density, and this.
  std::array<std::uint64_t, kClasses> ages_{};
  std::array<float, kClasses> least_;
  std::array<i32, kClasses> least_cell_{};

  i32 aging_ = 0;                                 // the class whose lists are looked at
  std::uint64_t to_age_ = 0;                      // and those of its ages still to do
  i64 turns_ = 0;                                 // of all classes
  i64 learned_ = 0, learns_after_ = kLeastTicks;  // the clock of the latest collect(), and ticks from one to the next
  i32 to_rate_ = kClasses;                        // the class to rate next; none is left
};

void DensityPolicy::reserve(i64 ids) {
  if (ids <= blocks_.ids()) return;
  for (const Ghost& ghost : ghosts_.resize(std::max(kGhostsPerId * ids, kLeastGhosts))) lose(ghost);
  blocks_.reserve(ids);  // last: should it find no memory, all of this is tried again
  learns_after_ = std::max(ids / kLearnsPerIds, kLeastTicks);
}

void DensityPolicy::insert(i32 id, std::uint64_t key, i32 parent) {
  tick();
  Block& block = blocks_[id];
  block.open = 0;
  block.uses = 1;
  const Ghost ghost = ghosts_.take(key);
  if (ghost.uses > 0) {
    statistics_.used_again(ghost.uses, begun(ghost.begun), clock_);
    block.uses = std::min(ghost.uses + 1, kMostUses);
  }
  add_child(parent);
}

void DensityPolicy::undo_insert(i32 id, std::uint64_t key, i32 parent) {
  const Block& block = blocks_[id];
  if (block.uses > 1) lose(ghosts_.remember(key, {block.begun, static_cast<i32>(block.uses) - 1}));
  if (drop_child(parent, true)) put_back(parent);
}

void DensityPolicy::hit(i32 id) {
  tick();
  Block& block = blocks_[id];
  if (block.open) statistics_.used_again(block.uses, begun(block.begun), clock_);
  block.open = 0;
  block.uses = std::min(block.uses + 1, kMostUses);
}

void DensityPolicy::use(i32 id) {
  Block& block = blocks_[id];
  if (block.children == 0) remove(id);
  block.evictable = 0;
}

void DensityPolicy::undo_use(i32 id) {
  Block& block = blocks_[id];
  block.evictable = 1;
  if (block.children == 0) put_back(id);
}

// To where it stood before the latest remove(), also where its neighbours have left meanwhile and it stood at an end,
// as what is evicted next does; else to where it goes next.
void DensityPolicy::put_back(i32 id) {
  if (blocks_.undo_remove(id)) {
    const i32 alone = blocks_.alone_in(id);
    if (alone >= 0) mark(alone, true);
    return;
  }
  const i32 first_of = blocks_.was_first_of(id), last_of = blocks_.was_last_of(id);
  if (first_of != last_of) return first_of >= 0 ? push_front(first_of, id) : push_back(last_of, id);
  const i32 list = first_of >= 0 ? first_of : cell_of(blocks_[id]);
  youngest_first(list) ? push_back(list, id) : push_front(list, id);
}

void DensityPolicy::release(i32 id) {
  Block& block = blocks_[id];
  if (block.open) statistics_.lost_sight(block.uses, begun(block.begun), clock_);  // used, but nobody had found it
  begin_life(&block);
  block.evictable = 1;
  if (block.children == 0) push_back(ReuseStatistics::cell_of(block.uses, 0), id);
}

void DensityPolicy::undo_release(i32 id) {
  Block& block = blocks_[id];
  block.evictable = 0;
  if (block.children == 0) take_back_push(id);
}

void DensityPolicy::take_back_push(i32 id) {
  if (const i32 emptied = blocks_.undo_push(id); emptied >= 0) mark(emptied, false);
}

i32 DensityPolicy::victim() {
  const i32 cls = static_cast<i32>(std::min_element(least_.begin(), least_.end()) - least_.begin());
  if (least_[at(cls)] == kNone) return any_released();
  const i32 cell = least_cell_[at(cls)];
  return youngest_first(cell) ? blocks_.back(cell) : blocks_.front(cell);
}

// A released block has a released leaf behind it, unless it had more children at once than can be counted.
i32 DensityPolicy::any_released() {
  i64 id = 0;
  while (id < blocks_.ids() && !blocks_[static_cast<i32>(id)].evictable) ++id;
  return id < blocks_.ids() ? static_cast<i32>(id) : -1;
}

void DensityPolicy::evict(i32 id, std::uint64_t key, i32 parent) {
  Block& block = blocks_[id];
  if (block.children == 0) remove(id);
  block.evictable = 0;
  if (!block.open) begin_life(&block);
  if (block.children == kMostChildren) block.children = 0;  // nobody knows; as an inner block it went last of all
  lose(ghosts_.remember(key, {block.begun, static_cast<i32>(block.uses)}));
  // At least as long unused as those that came there by themselves.
  if (drop_child(parent)) push_front(cell_of(blocks_[parent]), parent);
}

void DensityPolicy::restore(i32 id, std::uint64_t key, i32 parent) {
  Block& block = blocks_[id];
  if (ghosts_.take(key).uses == 0) begin_life(&block);
  add_child(parent, true);
  block.evictable = 1;
  if (block.children == 0) put_back(id);
}

// A released leaf that gets a child leaves its list.
void DensityPolicy::add_child(i32 parent, bool undo) {
  if (parent < 0) return;
  Block& block = blocks_[parent];
  if (block.children < kMostChildren) ++block.children;
  if (block.children == 1 && block.evictable) undo ? take_back_push(parent) : remove(parent);
}

// True if `parent` is a released leaf now, and stands in no list yet.
bool DensityPolicy::drop_child(i32 parent, bool undo) {
  if (parent < 0) return false;
  Block& block = blocks_[parent];
  if (block.children == 0 || block.children == kMostChildren) return false;
  if (--block.children > 0) return false;
  if (!block.evictable && !undo) blocks_.forget_place(parent);  // in use when its last child went: its turn comes anew
  return block.evictable;
}

// Blocks whose use draws nearer (a loop larger than the cache) are worth more the longer ago they were used.
bool DensityPolicy::youngest_first(i32 cell) const {
  return (cell + 1) % kAges != 0 && statistics_.density(cell + 1) > statistics_.density(cell);
}

void DensityPolicy::push_back(i32 list, i32 id) {
  if (blocks_.empty(list)) mark(list, true);
  blocks_.push_back(list, id);
}

void DensityPolicy::push_front(i32 list, i32 id) {
  if (blocks_.empty(list)) mark(list, true);
  blocks_.push_front(list, id);
}

void DensityPolicy::remove(i32 id) {
  const i32 emptied = blocks_.remove(id);
  if (emptied >= 0) mark(emptied, false);
}

void DensityPolicy::mark(i32 list, bool filled) {
  const i32 cls = list / kAges;
  const std::uint64_t bit = std::uint64_t{1} << (list % kAges);
  ages_[at(cls)] = filled ? ages_[at(cls)] | bit : ages_[at(cls)] & ~bit;
  find_least(cls);
}

void DensityPolicy::find_least(i32 cls) {
  float least = kNone;
  for (std::uint64_t ages = ages_[at(cls)]; ages != 0; ages &= ages - 1) {
    const i32 cell = cls * kAges + __builtin_ctzll(ages);
    if (statistics_.density(cell) >= least) continue;
    least = statistics_.density(cell);
    least_cell_[at(cls)] = cell;
  }
  least_[at(cls)] = least;
}

void DensityPolicy::begin_life(Block* block) {
  block->open = 1;
  block->begun = static_cast<std::uint32_t>(clock_);
  statistics_.begin(block->uses, clock_);
}

void DensityPolicy::lose(const Ghost& ghost) {
  if (ghost.uses > 0) statistics_.lost_sight(ghost.uses, begun(ghost.begun), clock_);
}

void DensityPolicy::do_chore() {
  statistics_.advance(clock_);
  const i64 chore = (clock_ >> kChoreBits) & ((1 << kTurnBits) - 1);
  chore < kClasses ? age_lists() : learn();
}

// A list is looked at every 256 ticks, or when an eighth of the width of its age has gone by, whatever is longer:
// octaves from 4,096 ticks on at every second turn, every fourth, and so on. The last age has no next.
void DensityPolicy::age_lists() {
  if (to_age_ == 0) {
    aging_ = (aging_ + 1) % kClasses;
    turns_ += aging_ == 0;
    const i32 ages = std::min(19 + 2 * __builtin_ctzll(static_cast<std::uint64_t>(turns_) | 1 << 20), kAges - 1);
    to_age_ = ages_[at(aging_)] & ((std::uint64_t{1} << ages) - 1);
  }
  for (i32 moves = 0; to_age_ != 0; to_age_ &= to_age_ - 1) {
    const i32 age = __builtin_ctzll(to_age_), cell = aging_ * kAges + age;
    while (!blocks_.empty(cell)) {
      const i32 id = blocks_.front(cell), older = cell_of(blocks_[id]);
      if (older <= cell) break;
      if (moves++ == kMovesPerChore) return;
      remove(id);
      push_back(older, id);
    }
  }
}

// One part of it: the counts, or one class.
void DensityPolicy::learn() {
  if (to_rate_ < kClasses) {
    statistics_.rate(to_rate_);
    find_least(to_rate_++);
  } else if (clock_ - learned_ >= learns_after_) {
    const double remembered = static_cast<double>(blocks_.ids() + ghosts_.size());
    statistics_.collect(clock_, std::exp2(static_cast<double>(learned_ - clock_) / (kHalfLife * remembered)));
    learned_ = clock_;
    to_rate_ = 0;
  }
}

}  // namespace

std::unique_ptr<EvictionPolicy> make_density_policy() { return std::make_unique<DensityPolicy>(); }

}  // namespace kvmem
