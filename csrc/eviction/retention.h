// Retention priorities that a user sets on single blocks, on top of any base policy. Blocks of priority 50, the
// default, are ordered by the base policy. Blocks of lower priority are evicted before those, blocks of higher priority
// after them, in ascending order, and within a priority the longest released block first. A priority may expire a
// number of seconds after each release.
//
// A block is protected while a cached descendant has a priority other than 50, because the descendant cannot be found
// without it: the block is in the list of its own priority and not in the base, even if that priority is 50. Once no
// such descendant is left, it enters the base as if released at that moment. A block with cached children is not
// evicted while there is a released block without.
#pragma once

#include <bitset>
#include <functional>
#include <memory>
#include <vector>

#include "base/id_lists.h"
#include "eviction/policy.h"

namespace kvmem {

// A priority, and for how many seconds from the next release on: 0 without end.
struct Priority {
  static constexpr int kBaseDecides = 50;
  int level = kBaseDecides;
  double seconds = 0;
  bool is_set() const { return level != kBaseDecides; }
};

class RetentionPolicy final : public EvictionPolicy {
 public:
  using Clock = std::function<double()>;  // monotonic seconds

  // With a null `base`, only reserve() may be called until wrap() provides one. `clock` defaults to a monotonic
  // clock.
  explicit RetentionPolicy(std::unique_ptr<EvictionPolicy> base, Clock clock = {});
  void wrap(std::unique_ptr<EvictionPolicy> base) { base_ = std::move(base); }

  // Sets the priority of a cached block until it is evicted. It lasts `ttl_seconds` from each release, or from now if
  // the block is released; 0, less than 0 and infinity mean without end. Throws SpecError for a block that is not
  // cached and for a priority outside 0 to 100. Cost: O(1), or O(log n) with a time to live; the first call for a block
  // in the middle of a chain also walks to the start of the chain.
  void retain(i32 id, int priority, double ttl_seconds);

  // Returns what retain() has set of a cached block unless it has expired; of a released block the seconds that remain.
  Priority priority(i32 id) const;

  // Adopt the state of a base policy that is in use already. REQUIRES: no other call but reserve() came before.
  // follow(): the base has this block, in use or released. lead(): a followed block, and its parent, which need not be
  // cached (with snapshots, blocks between two of them are not).
  void follow(i32 id, bool released);
  void lead(i32 parent, i32 child);

  void reserve(i64 ids) override;
  void insert(i32 id, std::uint64_t key, i32 parent) override;
  void undo_insert(i32 id, std::uint64_t key, i32 parent) override;
  void expect(i32 id, std::uint64_t key) override { base_->expect(id, key); }
  void prefetch(i32 id) const override { base_->prefetch(id); }
  void hit(i32 id) override;
  void use(i32 id) override;
  void undo_use(i32 id) override;
  void release(i32 id) override;
  void undo_release(i32 id) override;
  i64 aged() const override { return base_->aged(); }
  // Reads the clock only while a released block has a time to live.
  i32 victim() override;
  void evict(i32 id, std::uint64_t key, i32 parent) override;
  void restore(i32 id, std::uint64_t key, i32 parent) override;
  void digest(Hasher& hash) const override;

 private:
  static constexpr int kPriorities = 101, kBaseDecides = Priority::kBaseDecides;
  static constexpr i32 kNowhere = -1, kBase = -2;  // in place of a list: in use, or in the base policy
  static_assert(kPriorities <= 128 && kBaseDecides < kPriorities, "Block::priority has 8 bits");

  struct Block {
    double ttl = 0;       // of a priority other than 50; 0: no end
    double deadline = 0;  // 0: none
    i32 heap_index = -1;
    i32 place = kNowhere;
    i32 left = kNowhere;  // the list from which the latest use() took it
    i32 parent = -1;
    i32 children = 0;          // cached ones; under a window, children may be cached while this block is not
    i32 holding_children = 0;  // those children that protect this block
    std::int8_t priority = kBaseDecides;
    bool cached = false;
    bool released = false;
    bool holds = false;  // protects its parent
  };

  Block& at(i32 id) { return blocks_[static_cast<std::size_t>(id)]; }
  i32 place_of(const Block& block) const;
  // How a block enters the list that place_of() wants: at the back, at the front, or, where a call is undone, at its
  // former position.
  enum class Moves : std::uint8_t { last, first, back };
  void place(i32 id, Moves how = Moves::last);
  void take_back_push(i32 id);
  void come_back(i32 id, i32 left);
  void list_again(i32 id, i32 left);
  void leave(i32 id);
  void count_child(i32 parent, i32 change, Moves how);
  void update_holds(i32 id);
  void undo_holds(i32 id);
  bool set_holds(i32 id);
  i32 first_of(int begin, int end, bool inner) const;

  void start_clock(i32 id);
  void stop_clock(i32 id);
  void resume_clock(i32 id);
  void expire();
  void sift_up(std::size_t index);
  void sift_down(std::size_t index);
  void set_heap(std::size_t index, i32 id);

  std::unique_ptr<EvictionPolicy> base_;
  Clock clock_;
  std::vector<Block> blocks_;
  IdLists<> lists_{2 * kPriorities};  // for each priority: blocks without cached children, blocks with cached children
  std::bitset<2 * kPriorities> filled_;
  std::vector<i32> heap_;  // released blocks with a time to live: a binary heap, earliest deadline first
  bool timed_ = false;     // a block has had a time to live
  i32 named_ = -1;         // the answer of victim(), repeated until another call, whatever the clock says
};

}  // namespace kvmem
