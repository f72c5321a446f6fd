// Retention: a user's word on single blocks, over any policy. A block of priority 50 is the base policy's; lower ones
// go before all else, higher ones after all else, ascending, for some seconds after each release or for ever. Within a
// priority the longest released goes first.
//
// A block that leads to a cached one with a priority of its own stays until that one is gone or the base's again:
// without it that one could not be found. Then it comes to the base as if released at that moment. A block with cached
// children is not named while there is a released one without.
#pragma once

#include <bitset>
#include <functional>
#include <memory>
#include <vector>

#include "base/id_lists.h"
#include "eviction/policy.h"

namespace kvmem {

class RetentionPolicy final : public EvictionPolicy {
 public:
  using Clock = std::function<double()>;  // seconds, never going back

  // `base` null: reserve() is the only call, until take_over() brings one. `clock` empty: a steady one.
  explicit RetentionPolicy(std::unique_ptr<EvictionPolicy> base, Clock clock = {});
  void take_over(std::unique_ptr<EvictionPolicy> base) { base_ = std::move(base); }

  // From now until the block is evicted. `ttl_seconds` count from each release, or from now if it is released; 0 or
  // less and infinity mean for ever. O(1), O(log n) with a time to live; marking a block in the middle of a chain also
  // walks to its start once. SpecError for a priority out of 0 to 100.
  void retain(i32 id, int priority, double ttl_seconds);

  // Before any other call: what the base policy knows already. A block that it has, in use or released; and of two
  // such, which leads to which.
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
  // The clock is read only while a released block has a time to live.
  i32 victim() override;
  void evict(i32 id, std::uint64_t key, i32 parent) override;
  void restore(i32 id, std::uint64_t key, i32 parent) override;
  void digest(Hasher& hash) const override;

 private:
  static constexpr int kPriorities = 101, kBaseDecides = 50;
  static constexpr i32 kNowhere = -1, kBase = -2;  // else the list a released block stands in

  struct Block {
    double ttl = 0;       // of priorities other than 50; 0: for ever
    double deadline = 0;  // while in the heap
    i32 heap_index = -1;
    i32 place = kNowhere;
    i32 left = kNowhere;  // where the latest use() found it
    i32 parent = -1;
    i32 children = 0;          // cached ones; where a window passed, they may be there before and after this block
    i32 holding_children = 0;  // those of them that keep this block
    std::int8_t priority = kBaseDecides;
    bool cached = false;
    bool released = false;
    bool holds = false;  // its parent
  };

  Block& at(i32 id) { return blocks_[static_cast<std::size_t>(id)]; }
  i32 place_of(const Block& block) const;
  // How a block comes to a list that its state sends it to: as the last or the next of it, or because a call is taken
  // back, to where it stood.
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
  IdLists<> lists_{2 * kPriorities};  // of each priority: blocks without cached children, blocks with some
  std::bitset<2 * kPriorities> filled_;
  std::vector<i32> heap_;  // released blocks with a time to live, the earliest deadline first
  bool timed_ = false;     // some have ever had a time to live
  i32 named_ = -1;         // victim() answers the same until another call, whatever the clock says
};

}  // namespace kvmem
