// Evicts the block with the lowest hit density: the fewest hits to expect for the memory and time that it takes (LHD:
// Beckmann, Chen and Cidon, NSDI 2018). Only leaves of the cached tree are candidates. ReuseStatistics learns densities
// from how often a block was used and how long ago; docs/eviction.md explains this choice.
//
// Every released leaf is in the list of its cell, oldest first, and moves on to the next cell as it ages. Released
// blocks with cached children are in no list, because without them nothing that follows could be found; each enters a
// list when its last child is evicted. A call touches the 16 bytes of its block, those of its parent and its neighbours
// in the list, and one set of ghosts. The release of a whole sequence touches one list.

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "base/check.h"
#include "base/id_lists.h"
#include "eviction/ghosts.h"
#include "eviction/policy.h"
#include "eviction/statistics.h"

namespace kvmem {
namespace {

constexpr i32 kClasses = ReuseStatistics::kClasses, kAges = ReuseStatistics::kAges, kCells = ReuseStatistics::kCells;
// About twice as many ghosts as ids. A small cache evicts most blocks before they can be used again, and learns only
// from ghosts; 16,384 of them take 128 KiB.
constexpr i64 kGhostsPerId = 2, kLeastGhosts = 16384;
// All densities are recomputed, in parts, while one sixteenth of the blocks is replaced: about 9 us altogether.
constexpr i64 kLearnsPerIds = 16, kLeastTicks = 1024;
// Observations lose half their weight while as many blocks are used as are remembered, cached or as ghosts: long enough
// for significance, short enough to follow a change of traffic.
constexpr double kHalfLife = 1;
// Background work is done at every 16th tick, one chore at a time. A turn has 16 chores: one for the lists of each
// class, the others for learning.
constexpr i32 kChoreBits = ReuseStatistics::kTickBits, kTurnBits = 4;
static_assert(kClasses < 1 << kTurnBits);
constexpr i32 kMovesPerChore = 128;  // blocks that move to their next age; the next chore continues where one stops
constexpr i32 kMostUses = 255, kMostChildren = (1 << 22) - 1;  // larger counts are not distinguished
static_assert(kAges <= 64, "DensityPolicy::ages_ has one bit for each age");
static_assert(kMostUses < 1 << 8 && kMostChildren < 1 << 22,
              "the counts fit the bit fields of Block and a ghost's mark");
constexpr float kNone = std::numeric_limits<float>::infinity();

struct Block : IdNode {
  Block() : uses(0), children(0), open(0), evictable(0) {}

  std::uint32_t begun = 0;  // lower 32 bits of the clock when its life began
  std::uint32_t uses : 8;
  std::uint32_t children : 22;  // cached ones; under a window, children may be cached while this block is not
  std::uint32_t open : 1;       // its life has begun, and no hit has ended it
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
  void unskip(i32 id);
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

  i64 clock_ = 0;  // counts the blocks inserted or hit
  IdLists<Block> blocks_{kCells};
  Ghosts ghosts_;
  ReuseStatistics statistics_;
  // For each class: a bit for each age whose list is not empty; of these lists, the lowest density, and its cell.
  std::array<std::uint64_t, kClasses> ages_{};
  std::array<float, kClasses> least_;
  std::array<i32, kClasses> least_cell_{};

  i32 aging_ = 0;                                 // the class whose lists age_lists() works on
  std::uint64_t to_age_ = 0;                      // its ages that remain to be done
  i64 turns_ = 0;                                 // completed turns over all classes
  i64 learned_ = 0, learns_after_ = kLeastTicks;  // the clock of the latest collect(), and the ticks between two
  i32 to_rate_ = kClasses;                        // the class that is rated next; kClasses: none
};

void DensityPolicy::reserve(i64 ids) {
  if (ids <= blocks_.ids()) return;
  for (const Ghost& ghost : ghosts_.resize(std::max(kGhostsPerId * ids, kLeastGhosts))) lose(ghost);
  blocks_.reserve(ids);  // last, so that a retry after std::bad_alloc starts over
  learns_after_ = std::max(ids / kLearnsPerIds, kLeastTicks);
}

void DensityPolicy::insert(i32 id, std::uint64_t key, i32 parent) {
  KVMEM_ASSERT(!blocks_[id].evictable, "the block is not cached");
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
  KVMEM_ASSERT(!blocks_[id].evictable, "the block is in use");
  const Block& block = blocks_[id];
  if (block.uses > 1) lose(ghosts_.remember(key, {block.begun, static_cast<i32>(block.uses) - 1}));
  if (drop_child(parent, true)) unskip(parent);
}

void DensityPolicy::hit(i32 id) {
  tick();
  Block& block = blocks_[id];
  if (block.open) statistics_.used_again(block.uses, begun(block.begun), clock_);
  block.open = 0;
  block.uses = std::min(block.uses + 1, kMostUses);
}

void DensityPolicy::use(i32 id) {
  KVMEM_ASSERT(blocks_[id].evictable, "the block is released");
  Block& block = blocks_[id];
  if (block.children == 0) remove(id);
  block.evictable = 0;
}

void DensityPolicy::undo_use(i32 id) {
  KVMEM_ASSERT(!blocks_[id].evictable, "the block is in use");
  Block& block = blocks_[id];
  block.evictable = 1;
  if (block.children == 0) unskip(id);
}

// Reinserts a block at its position before the latest remove(). If its neighbours are gone and it was at one end of a
// list, as every victim is, it returns to that end; otherwise it becomes the next victim of its list.
void DensityPolicy::unskip(i32 id) {
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
  KVMEM_ASSERT(!blocks_[id].evictable, "the block is in use");
  Block& block = blocks_[id];
  if (block.open) statistics_.lost_sight(block.uses, begun(block.begun), clock_);  // it was used without a hit
  begin_life(&block);
  block.evictable = 1;
  if (block.children == 0) push_back(ReuseStatistics::cell_of(block.uses, 0), id);
}

void DensityPolicy::undo_release(i32 id) {
  KVMEM_ASSERT(blocks_[id].evictable, "the block is released");
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

// Returns any released block, or -1. Only needed where no released leaf is listed: a released block has a released
// descendant that is a leaf, unless it had kMostChildren children at once.
i32 DensityPolicy::any_released() {
  i64 id = 0;
  while (id < blocks_.ids() && !blocks_[static_cast<i32>(id)].evictable) ++id;
  return id < blocks_.ids() ? static_cast<i32>(id) : -1;
}

void DensityPolicy::evict(i32 id, std::uint64_t key, i32 parent) {
  KVMEM_ASSERT(blocks_[id].evictable, "the block is released");
  Block& block = blocks_[id];
  if (block.children == 0) remove(id);
  block.evictable = 0;
  if (!block.open) begin_life(&block);
  if (block.children == kMostChildren) block.children = 0;  // unknown; the block was the last candidate of all
  lose(ghosts_.remember(key, {block.begun, static_cast<i32>(block.uses)}));
  // To the front: it is at least as old as the blocks that aged into that list.
  if (drop_child(parent)) push_front(cell_of(blocks_[parent]), parent);
}

void DensityPolicy::restore(i32 id, std::uint64_t key, i32 parent) {
  KVMEM_ASSERT(!blocks_[id].evictable, "the block was evicted");
  Block& block = blocks_[id];
  if (ghosts_.take(key).uses == 0) begin_life(&block);
  add_child(parent, true);
  block.evictable = 1;
  if (block.children == 0) unskip(id);
}

// Counts a cached child. A released leaf that gets a child leaves its list.
void DensityPolicy::add_child(i32 parent, bool undo) {
  if (parent < 0) return;
  Block& block = blocks_[parent];
  if (block.children < kMostChildren) ++block.children;
  if (block.children == 1 && block.evictable) undo ? take_back_push(parent) : remove(parent);
}

// Uncounts a cached child. Returns true if `parent` is a released leaf now; it is in no list then.
bool DensityPolicy::drop_child(i32 parent, bool undo) {
  if (parent < 0) return false;
  Block& block = blocks_[parent];
  if (block.children == 0 || block.children == kMostChildren) return false;
  if (--block.children > 0) return false;
  if (!block.evictable && !undo) blocks_.forget_place(parent);  // in use now, so its next release decides
  return block.evictable;
}

// Returns true where density rises with age: the next use of such blocks draws nearer (a loop larger than the cache),
// so the youngest is evicted first.
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
  KVMEM_ASSERT(filled || blocks_.empty(list), "a list is marked empty only when it is");
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

// Moves blocks that have aged to their next list. A list is checked every 256 ticks, or every eighth of the width of
// its age where that is longer: octaves from 4,096 ticks on at every second turn, every fourth, and so on. The last age
// has no successor.
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

// One part of learning: collects the counts, or rates one class.
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
