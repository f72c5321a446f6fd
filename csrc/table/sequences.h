// Sequences: handles and lengths. A handle is an int32 that counts the sequences of an allocator. Each is used once, so
// a handle kept after free() is recognised for ever (invariant 8). Handles run from 1 to 2^31 - 1 and then from -2^31
// to -2, more than four thousand million. 0 and -1, which callers often use for "none", are not handles.
//
// A sequence also has an index below max_sequences, which is used again. A hash table maps handles to indices: it has
// four slots for each index, and a live handle is in slot `handle modulo slots`. The next handle is the next number
// whose slot is free; at most a quarter of all numbers are skipped.
#pragma once

#include <ctime>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/digest.h"
#include "base/ops.h"
#include "base/zero_vector.h"

namespace kvmem {

class Sequences {
 public:
  struct Lengths {
    i64 tokens = 0, committed = 0, front = 0;
  };

  // `first`: the number of the first handle, for tests.
  Sequences(i64 max_sequences, i64 groups, i64 first = 1)
      : groups_(groups),
        next_(first),
        handles_(max_sequences),
        opened_at_(max_sequences),
        free_(max_sequences),
        lengths_(max_sequences * groups) {
    i64 slots = 4;
    while (slots < 4 * max_sequences) slots *= 2;
    slots_.resize(slots);
    slots_[0].handle = free_mark(0);
    free_count_ = max_sequences;
  }

  i64 capacity() const { return static_cast<i64>(handles_.size()); }
  i64 count() const { return capacity() - free_count_; }
  i64 opened() const { return next_; }  // grows with each sequence that is opened
  bool live(i64 index) const { return handles_[index] != kNone; }
  i64 handle_of(i64 index) const { return handles_[index]; }  // REQUIRES: live(index)

  bool is_live(i64 handle) const { return slots_[slot_of(handle)].handle == handle; }
  // Returns the index of a handle. Throws StaleHandle if it was freed or never existed, NotReady if it is pending.
  i64 index(i64 handle) const {
    const Slot& slot = slots_[slot_of(handle)];
    if (slot.handle != handle) refuse(handle);
    return slot.index;
  }

  // The lengths in one group, for loops over many sequences: those of the next index follow groups_ entries later.
  Lengths* lengths(i64 group, i64 index) { return &lengths_[index * groups_ + group]; }
  const Lengths* lengths(i64 group, i64 index) const { return &lengths_[index * groups_ + group]; }

  // Returns the index of a handle that is live, or was when the call in progress began.
  i64 place_of(i64 handle) const { return slots_[slot_of(handle)].index; }

  // No sequence can be opened from now on.
  void close() { next_ = kLast + 1, closed_ = true; }

  // Returns the handle of the next sequence. Throws OutOfMemory if all indices are in use, SpecError if all handles
  // have been used, StaleHandle after close().
  i64 next_handle() const {
    if (free_count_ == 0 || next_ > kLast) refuse_more();
    return handle_of_number(next_);
  }

  // Undoing an open or close restores the order of free indices and the next handle too.
  void on_open(i64 handle, bool undo) {
    if (!undo && (free_count_ == 0 || next_ > kLast || handle_of_number(next_) != handle)) refuse_open(handle);
    --free_count_;
    const i64 index = free_at(undo ? wrap(head_ + free_count_) : head_);
    if (!undo) head_ = wrap(head_ + 1);
    KVMEM_ASSERT(!live(index) && !is_live(handle), "the index and the handle are free");
    handles_[index] = handle;
    if (!undo) opened_at_[index] = now_ns();
    slots_[slot_of(handle)] = {static_cast<i32>(handle), static_cast<i32>(index)};
    // Slots in use are skipped here, not in next_handle(), so that undoing knows the number before.
    while (!undo && next_ <= kLast && !is_free(next_)) ++next_;
  }

  void on_close(i64 handle, bool undo) {
    const i64 freed = index(handle), slot = slot_of(handle);
    handles_[freed] = kNone;
    slots_[slot].handle = free_mark(slot);
    if (undo) {
      next_ = number_of(handle);
      head_ = wrap(head_ + capacity() - 1);
      set_free(head_, freed);
    } else {
      set_free(wrap(head_ + free_count_), freed);
    }
    ++free_count_;
    KVMEM_ASSERT(free_count_ <= capacity() && !is_live(handle), "an index is freed once");
  }

  // While a sequence is pending, index() refuses it, so that no call but free() can use it. REQUIRES: it is open.
  void set_pending(i64 handle, bool pending) {
    const i64 slot = slot_of(handle);
    slots_[slot].handle = static_cast<i32>(pending ? pending_mark(slot) : handle);
  }
  bool is_pending(i64 handle) const {
    const Slot& slot = slots_[slot_of(handle)];
    return slot.handle == pending_mark(slot_of(handle)) && handles_[slot.index] == handle;
  }

  // Returns how long ago the sequence was opened, to some milliseconds.
  double age_seconds(i64 index) const { return static_cast<double>(now_ns() - opened_at_[index]) * 1e-9; }

  // In one group: tokens for which there is room, how many of them are committed, and the first that a window retains.
  i64& tokens(i64 index, i64 group) { return lengths_[index * groups_ + group].tokens; }
  i64& committed(i64 index, i64 group) { return lengths_[index * groups_ + group].committed; }
  i64& front(i64 index, i64 group) { return lengths_[index * groups_ + group].front; }
  i64 tokens(i64 index, i64 group) const { return lengths_[index * groups_ + group].tokens; }
  i64 committed(i64 index, i64 group) const { return lengths_[index * groups_ + group].committed; }
  i64 front(i64 index, i64 group) const { return lengths_[index * groups_ + group].front; }

  void digest(Hasher& hash) const {
    hash.add(next_, free_count_);
    hash.add_all(handles_);
    for (i64 i = 0; i < free_count_; ++i) hash.add(free_at(wrap(head_ + i)));
    for (i64 index = 0; index < capacity(); ++index) {
      if (!live(index)) continue;
      for (i64 g = 0; g < groups_; ++g) hash.add(tokens(index, g), committed(index, g), front(index, g));
    }
  }

 private:
  struct Slot {
    i32 handle = 0, index = 0;
  };
  static constexpr i64 kNone = 0;  // not a handle
  static constexpr i64 kLast = (i64{1} << 32) - 2;

  static i64 handle_of_number(i64 number) { return static_cast<i32>(static_cast<std::uint32_t>(number)); }
  static i64 number_of(i64 handle) { return static_cast<std::uint32_t>(handle); }
  i64 slot_of(i64 handle) const { return handle & (static_cast<i64>(slots_.size()) - 1); }
  bool is_free(i64 number) const { return slots_[slot_of(number)].handle == free_mark(slot_of(number)); }
  // The content of a free slot: a number that belongs to another slot, so that no handle equals it. It is 0 where
  // possible, so that slots which were never used take no memory.
  static i32 free_mark(i64 slot) { return slot == 0 ? 1 : 0; }
  // The content of a pending sequence's slot: another such number, and no mark of a free slot.
  i32 pending_mark(i64 slot) const { return slot + 1 == static_cast<i64>(slots_.size()) ? 1 : -1; }
  // Entry `at` of the ring of free indices. It is stored relative to `at`, so that the initial ring is all zero bits.
  i64 free_at(i64 at) const { return at + free_[at]; }
  void set_free(i64 at, i64 index) { free_[at] = static_cast<i32>(index - at); }

  // Returns `at` modulo capacity(). REQUIRES: at < 2 * capacity(). A division would take longer.
  i64 wrap(i64 at) const { return at < capacity() ? at : at - capacity(); }

  // The kernel's coarse clock, which costs a tenth of the exact one.
  static i64 now_ns() {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return now.tv_sec * 1'000'000'000 + now.tv_nsec;
  }

  // Errors, out of line because their callers are inlined everywhere.
  [[noreturn, gnu::cold, gnu::noinline]] void refuse(i64 handle) const {
    if (is_pending(handle)) {
      throw NotReady("sequence handle " + std::to_string(handle) +
                     " is pending: its blocks are still being loaded; wait until ready() names it, or free it");
    }
    throw StaleHandle("sequence handle " + std::to_string(handle) +
                      " is not live: it was freed, or this allocator never gave it out");
  }
  [[noreturn, gnu::cold, gnu::noinline]] void refuse_more() const {
    if (closed_) throw StaleHandle("this allocator is closed");
    if (free_count_ == 0) {
      throw OutOfMemory("asked for one more sequence; all " + std::to_string(capacity()) +
                        " are in use: free one, or raise max_sequences");
    }
    throw SpecError(
        "asked for one more sequence; this allocator has given out all int32 handles there are: make another");
  }
  [[noreturn, gnu::cold, gnu::noinline]] static void refuse_open(i64 handle) {
    throw SpecError("open: handle " + std::to_string(handle) +
                    " is not the one that comes next; max_sequences must be that of the allocator whose ops are "
                    "followed, and no list of ops be missing");
  }

  const i64 groups_;
  i64 next_;                 // the number of the next handle
  ZeroVector<Slot> slots_;   // by handle, modulo their number
  ZeroVector<i64> handles_;  // by index
  bool closed_ = false;
  ZeroVector<i64> opened_at_;  // by index, in ns; reported only
  ZeroVector<i32> free_;       // ring of free indices, the oldest at head_; see free_at()
  i64 head_ = 0, free_count_ = 0;
  ZeroVector<Lengths> lengths_;  // [index][group]
};

}  // namespace kvmem
