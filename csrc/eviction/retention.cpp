#include "eviction/retention.h"

#include <chrono>
#include <cmath>
#include <utility>

#include "base/check.h"

namespace kvmem {
namespace {

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

RetentionPolicy::RetentionPolicy(std::unique_ptr<EvictionPolicy> base, Clock clock)
    : base_(std::move(base)), clock_(clock ? std::move(clock) : steady_seconds) {}

void RetentionPolicy::retain(i32 id, int priority, double ttl_seconds) {
  if (priority < 0 || priority >= kPriorities) {
    throw SpecError("priority: got " + std::to_string(priority) +
                    "; must be 0 to 100, where 50 lets the policy decide");
  }
  Block& block = at(id);
  if (!block.cached) throw SpecError("block: got " + std::to_string(id) + "; only a cached block can be retained");
  named_ = -1;
  stop_clock(id);
  block.priority = static_cast<std::int8_t>(priority);
  block.ttl = ttl_seconds > 0 && std::isfinite(ttl_seconds) ? ttl_seconds : 0;
  timed_ = timed_ || block.ttl > 0;
  if (block.released) start_clock(id);
  place(id);
  update_holds(id);
}

Priority RetentionPolicy::priority(i32 id) const {
  const Block& block = blocks_[static_cast<std::size_t>(id)];
  if (!block.cached) return {};
  if (block.deadline == 0 || !block.released) return {block.priority, block.ttl};
  const double left = block.deadline - clock_();
  return left > 0 ? Priority{block.priority, left} : Priority{};
}

void RetentionPolicy::follow(i32 id, bool released) {
  KVMEM_ASSERT(!at(id).cached, "a block is adopted once");
  Block& block = at(id);
  block.cached = true;
  block.released = released;
  block.place = released ? kBase : kNowhere;
}

void RetentionPolicy::lead(i32 parent, i32 child) {
  KVMEM_ASSERT(at(child).cached && at(child).parent < 0, "the child is adopted, and has no parent yet");
  at(child).parent = parent;
  ++at(parent).children;
}

void RetentionPolicy::reserve(i64 ids) {
  if (ids <= static_cast<i64>(blocks_.size())) return;
  if (base_) base_->reserve(ids);
  lists_.reserve(ids);
  heap_.reserve(static_cast<std::size_t>(ids));
  blocks_.resize(static_cast<std::size_t>(ids));  // last, so that a retry after std::bad_alloc starts over
}

void RetentionPolicy::insert(i32 id, std::uint64_t key, i32 parent) {
  KVMEM_ASSERT(!at(id).cached && at(id).heap_index < 0, "the block is not cached");
  named_ = -1;
  Block block;
  block.cached = true;
  block.parent = parent;
  block.children = at(id).children;
  block.holding_children = at(id).holding_children;
  at(id) = block;
  base_->insert(id, key, parent);
  count_child(parent, 1, Moves::last);
  update_holds(id);
}

void RetentionPolicy::undo_insert(i32 id, std::uint64_t key, i32 parent) {
  KVMEM_ASSERT(at(id).cached && !at(id).released, "the block is cached and in use");
  named_ = -1;
  at(id).cached = false;
  undo_holds(id);
  count_child(parent, -1, Moves::back);
  base_->undo_insert(id, key, parent);
}

void RetentionPolicy::hit(i32 id) {
  named_ = -1;
  base_->hit(id);
}

void RetentionPolicy::use(i32 id) {
  KVMEM_ASSERT(at(id).cached && at(id).released, "the block is cached and released");
  named_ = -1;
  at(id).left = at(id).place;
  leave(id);
  stop_clock(id);
  at(id).released = false;
}

void RetentionPolicy::undo_use(i32 id) {
  KVMEM_ASSERT(at(id).cached && !at(id).released, "the block is cached and in use");
  named_ = -1;
  Block& block = at(id);
  block.released = true;
  block.place = place_of(block);
  if (block.place == kBase) {
    base_->undo_use(id);
  } else if (block.place != kNowhere) {
    list_again(id, block.left);
  }
  if (block.deadline == 0) return;
  set_heap(heap_.size(), id);
  sift_up(heap_.size() - 1);
}

void RetentionPolicy::release(i32 id) {
  KVMEM_ASSERT(at(id).cached && !at(id).released, "the block is cached and in use");
  named_ = -1;
  at(id).released = true;
  start_clock(id);
  place(id);
}

void RetentionPolicy::undo_release(i32 id) {
  KVMEM_ASSERT(at(id).cached && at(id).released, "the block is cached and released");
  named_ = -1;
  take_back_push(id);
  stop_clock(id);
  at(id).released = false;
}

i32 RetentionPolicy::victim() {
  if (named_ >= 0) return named_;
  expire();
  named_ = first_of(0, kBaseDecides, false);
  if (named_ < 0) named_ = base_->victim();
  if (named_ < 0) named_ = first_of(kBaseDecides, kPriorities, false);
  if (named_ < 0) named_ = first_of(0, kPriorities, true);
  KVMEM_ASSERT(named_ < 0 || at(named_).released, "the victim is released");
  return named_;
}

void RetentionPolicy::evict(i32 id, std::uint64_t key, i32 parent) {
  KVMEM_ASSERT(at(id).cached && at(id).released, "the block is cached and released");
  named_ = -1;
  Block& block = at(id);
  const i32 place_before = block.place;
  if (place_before != kBase) {
    leave(id);
    base_->release(id);  // the base policy saw it as in use
  }
  base_->evict(id, key, parent);
  block.place = place_before;  // for restore(); insert() resets it
  stop_clock(id);
  block.cached = block.released = false;
  update_holds(id);
  count_child(parent, -1, Moves::first);
}

void RetentionPolicy::restore(i32 id, std::uint64_t key, i32 parent) {
  KVMEM_ASSERT(!at(id).cached, "the block was evicted");
  named_ = -1;
  Block& block = at(id);
  const i32 place_before = std::exchange(block.place, kNowhere);
  block.cached = block.released = true;
  count_child(parent, 1, Moves::back);
  undo_holds(id);
  base_->restore(id, key, parent);
  block.place = kBase;
  if (place_before != kBase) come_back(id, place_before);
  resume_clock(id);
}

// With a time to live, the clock changes the order during any call, and a call that fails does not undo that: then
// nothing is added.
void RetentionPolicy::digest(Hasher& hash) const {
  if (timed_) return;
  const i32 used = filled_.any() ? 2 * kPriorities : 0;  // equals the digest of the base where the base orders all
  for (i32 list = 0; list < used; ++list) lists_.digest(list, hash);
  base_->digest(hash);
}

i32 RetentionPolicy::place_of(const Block& block) const {
  if (!block.released) return kNowhere;
  if (block.priority == kBaseDecides && block.holding_children == 0) return kBase;
  return 2 * block.priority + (block.children > 0);
}

// Moves a block to the list that place_of() wants, if it is in another one.
void RetentionPolicy::place(i32 id, Moves how) {
  Block& block = at(id);
  const i32 wanted = place_of(block);
  if (block.place == wanted) return;
  if (how == Moves::back) {
    if (block.place != kNowhere) take_back_push(id);
    block.place = wanted;
    if (wanted == kBase) return base_->undo_use(id);
    if (wanted != kNowhere) list_again(id, wanted);
    return;
  }
  if (block.place != kNowhere) leave(id);
  block.place = wanted;
  if (wanted == kBase) {
    base_->release(id);
  } else if (wanted != kNowhere) {
    how == Moves::first ? lists_.push_front(wanted, id) : lists_.push_back(wanted, id);
    filled_.set(static_cast<std::size_t>(wanted));
  }
}

void RetentionPolicy::take_back_push(i32 id) {
  if (at(id).place == kBase) {
    base_->undo_release(id);
  } else if (const i32 emptied = lists_.undo_push(id); emptied >= 0) {
    filled_.reset(static_cast<std::size_t>(emptied));
  }
  at(id).place = kNowhere;
}

// Moves a block that restore() has put into the base back to its former list.
void RetentionPolicy::come_back(i32 id, i32 left) {
  const i32 wanted = place_of(at(id));
  if (wanted == kBase) return;
  base_->undo_release(id);
  at(id).place = wanted;
  if (wanted != kNowhere) list_again(id, left);
}

// Reinserts a block at its former position, or at the front of its list where that position is lost: the eviction of
// its children may have changed its list meanwhile.
void RetentionPolicy::list_again(i32 id, i32 left) {
  const i32 list = at(id).place;
  if (list != left || !lists_.undo_remove(id)) lists_.push_front(list, id);
  filled_.set(static_cast<std::size_t>(list));
}

void RetentionPolicy::leave(i32 id) {
  const i32 place = std::exchange(at(id).place, kNowhere);
  if (place == kBase) {
    base_->use(id);
  } else if (const i32 emptied = lists_.remove(id); emptied >= 0) {
    filled_.reset(static_cast<std::size_t>(emptied));
  }
}

// Adds `change` to the number of cached children of `parent`, and moves it to another list if that matters.
void RetentionPolicy::count_child(i32 parent, i32 change, Moves how) {
  if (parent < 0) return;
  at(parent).children += change;
  if (at(parent).cached) place(parent, how);
}

// Updates whether `id` protects its parent, and so on towards the start of the chain until nothing changes.
void RetentionPolicy::update_holds(i32 id) {
  while (set_holds(id)) {
    id = at(id).parent;
    if (at(id).cached) place(id);
  }
}

// Undoes update_holds(), the block nearest to the start of the chain first, since that one moved last. The parent links
// are reversed on the way up and restored on the way down, because there may be no memory for a stack.
void RetentionPolicy::undo_holds(i32 id) {
  i32 below = -1, top = id;
  while (set_holds(top)) {
    const i32 up = std::exchange(at(top).parent, below);
    below = std::exchange(top, up);
  }
  while (top != id) {
    if (at(top).cached) place(top, Moves::back);
    top = std::exchange(below, std::exchange(at(below).parent, top));
  }
}

// Updates whether `id` protects its parent, and the parent's count. Returns true if that count changed; the caller then
// moves the parent.
bool RetentionPolicy::set_holds(i32 id) {
  Block& block = at(id);
  const bool holds = block.cached && (block.priority != kBaseDecides || block.holding_children > 0);
  if (holds == block.holds) return false;
  block.holds = holds;
  if (block.parent < 0) return false;
  at(block.parent).holding_children += holds ? 1 : -1;
  return true;
}

// Returns the front block of the lowest priority in [begin, end), among blocks with cached children (`inner`) or
// without; -1 if there is none.
i32 RetentionPolicy::first_of(int begin, int end, bool inner) const {
  if (filled_.none()) return -1;
  for (int priority = begin; priority < end; ++priority) {
    const i32 list = 2 * priority + inner;
    if (filled_.test(static_cast<std::size_t>(list))) return lists_.front(list);
  }
  return -1;
}

void RetentionPolicy::start_clock(i32 id) {
  Block& block = at(id);
  block.deadline = 0;
  if (block.priority == kBaseDecides || block.ttl == 0) return;
  block.deadline = clock_() + block.ttl;
  resume_clock(id);
}

// Puts a block back into the heap with its former deadline.
void RetentionPolicy::resume_clock(i32 id) {
  if (at(id).deadline == 0) return;
  set_heap(heap_.size(), id);
  sift_up(heap_.size() - 1);
}

void RetentionPolicy::stop_clock(i32 id) {
  KVMEM_ASSERT(at(id).heap_index < static_cast<i32>(heap_.size()), "the index is within the heap");
  Block& block = at(id);
  if (block.heap_index < 0) return;
  const std::size_t index = static_cast<std::size_t>(std::exchange(block.heap_index, -1));
  const i32 last = heap_.back();
  heap_.pop_back();
  if (last == id) return;
  set_heap(index, last);
  sift_up(index);
  sift_down(static_cast<std::size_t>(at(last).heap_index));
}

void RetentionPolicy::expire() {
  if (heap_.empty()) return;
  const double now = clock_();
  while (!heap_.empty() && at(heap_.front()).deadline <= now) {
    const i32 id = heap_.front();
    stop_clock(id);
    at(id).priority = kBaseDecides;
    at(id).deadline = 0;
    place(id);
    update_holds(id);  // last, so that the blocks before it enter the base later and an LRU evicts them later
  }
}

void RetentionPolicy::set_heap(std::size_t index, i32 id) {
  KVMEM_ASSERT(index < heap_.size() || heap_.size() < heap_.capacity(), "reserve() made room for every block");
  if (index == heap_.size()) heap_.push_back(id);
  heap_[index] = id;
  at(id).heap_index = static_cast<i32>(index);
}

void RetentionPolicy::sift_up(std::size_t index) {
  const i32 id = heap_[index];
  while (index > 0 && at(id).deadline < at(heap_[(index - 1) / 2]).deadline) {
    set_heap(index, heap_[(index - 1) / 2]);
    index = (index - 1) / 2;
  }
  set_heap(index, id);
}

void RetentionPolicy::sift_down(std::size_t index) {
  const i32 id = heap_[index];
  while (2 * index + 1 < heap_.size()) {
    std::size_t child = 2 * index + 1;
    if (child + 1 < heap_.size() && at(heap_[child + 1]).deadline < at(heap_[child]).deadline) ++child;
    if (at(heap_[child]).deadline >= at(id).deadline) break;
    set_heap(index, heap_[child]);
    index = child;
  }
  set_heap(index, id);
}

}  // namespace kvmem
