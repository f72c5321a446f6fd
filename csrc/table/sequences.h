// Sequences: handles and lengths. A handle is an int32 that counts the sequences of an allocator, so that it is given
// out once: a handle kept after free() is recognised for ever (invariant 8). Handles run from 1 to 2^31 - 1 and then
// from -2^31 to -2, more than four thousand million in all; 0 and -1, which callers like for nobody, are none.
//
// A table of four slots for each place says where a live handle's sequence stands: slot `handle modulo slots`. The next
// handle is the next number whose slot is free. Of all numbers, those skipped are at most a quarter.
#pragma once

#include <ctime>
#include <string>
#include <vector>

#include "base/digest.h"
#include "base/ops.h"
#include "base/zero_vector.h"

namespace kvmem {

class Sequences {
 public:
  struct Lengths {
    i64 tokens = 0, committed = 0, front = 0;
  };

  // `first` is the number that counting starts from; for tests.
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
    slots_[0].handle = nobody(0);
    free_count_ = max_sequences;
  }

  i64 capacity() const { return static_cast<i64>(handles_.size()); }
  i64 count() const { return capacity() - free_count_; }
  i64 opened() const { return next_; }  // grows with every sequence that is opened
  bool live(i64 index) const { return handles_[index] != kNone; }
  i64 handle_of(i64 index) const { return handles_[index]; }  // of a place that is taken

  bool is_live(i64 handle) const { return slots_[slot_of(handle)].handle == handle; }
  // The place a handle stands for. StaleHandle when it was freed or never given out.
  i64 index(i64 handle) const {
    const Slot& slot = slots_[slot_of(handle)];
    if (slot.handle != handle) throw_stale(handle);
    return slot.place;
  }

  // Of one group; of the next sequence, as many entries on as there are groups. For loops over many.
  Lengths* lengths(i64 group, i64 index) { return &lengths_[index * groups_ + group]; }
  const Lengths* lengths(i64 group, i64 index) const { return &lengths_[index * groups_ + group]; }

  // The place of a handle that is live, or was until the call in progress.
  i64 place_of(i64 handle) const { return slots_[slot_of(handle)].place; }

  // No sequence is opened any more.
  void close() { next_ = kLast + 1, closed_ = true; }

  // The handle the next sequence gets. OutOfMemory when all places are taken; SpecError when all handles have been.
  i64 next_handle() const {
    if (free_count_ == 0 || next_ > kLast) refuse_more();
    return handle_of_number(next_);
  }

  // An open or close that is taken back leaves all as it was: the order of places and the next handle too.
  void on_open(i64 handle, bool undo) {
    if (!undo && (free_count_ == 0 || next_ > kLast || handle_of_number(next_) != handle)) refuse_open(handle);
    --free_count_;
    const i64 place = free_at(undo ? wrap(head_ + free_count_) : head_);
    if (!undo) head_ = wrap(head_ + 1);
    handles_[place] = handle;
    if (!undo) opened_at_[place] = now_ns();
    slots_[slot_of(handle)] = {static_cast<i32>(handle), static_cast<i32>(place)};
    // Passes what is taken now, not when it is asked for: taken back, this call knows what came before it.
    while (!undo && next_ <= kLast && !is_free(next_)) ++next_;
  }

  void on_close(i64 handle, bool undo) {
    const i64 place = index(handle), slot = slot_of(handle);
    handles_[place] = kNone;
    slots_[slot].handle = nobody(slot);
    if (undo) {
      next_ = number_of(handle);
      head_ = wrap(head_ + capacity() - 1);
      set_free(head_, place);
    } else {
      set_free(wrap(head_ + free_count_), place);
    }
    ++free_count_;
  }

  // How long ago the sequence was opened, to some milliseconds.
  double age_seconds(i64 index) const { return static_cast<double>(now_ns() - opened_at_[index]) * 1e-9; }

  // Per group: tokens held or reserved, how many of them are valid, and the first one still kept (windows).
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
    i32 handle = 0, place = 0;
  };
  static constexpr i64 kNone = 0;  // no handle
  static constexpr i64 kLast = (i64{1} << 32) - 2;

  static i64 handle_of_number(i64 number) { return static_cast<i32>(static_cast<std::uint32_t>(number)); }
  static i64 number_of(i64 handle) { return static_cast<std::uint32_t>(handle); }
  i64 slot_of(i64 handle) const { return handle & (static_cast<i64>(slots_.size()) - 1); }
  bool is_free(i64 number) const { return slots_[slot_of(number)].handle == nobody(slot_of(number)); }
  // What a free slot holds: a number whose own slot is another one, so no handle equals it. 0 wherever that can be, so
  // that slots which were never used take no memory.
  static i32 nobody(i64 slot) { return slot == 0 ? 1 : 0; }
  // Entry `at` of the ring of free places. At first it is `at` itself, and all entries are zero bits.
  i64 free_at(i64 at) const { return at + free_[at]; }
  void set_free(i64 at, i64 place) { free_[at] = static_cast<i32>(place - at); }

  // A place in the ring, of less than twice as many. Not by division, which every admission and end would make.
  i64 wrap(i64 at) const { return at < capacity() ? at : at - capacity(); }

  // As the kernel last noted it: reading it costs a tenth of reading the clock itself.
  static i64 now_ns() {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return now.tv_sec * 1'000'000'000 + now.tv_nsec;
  }

  // The errors, kept out of the way of what is called for every token.
  [[noreturn, gnu::cold, gnu::noinline]] static void throw_stale(i64 handle) {
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
  ZeroVector<Slot> slots_;   // by number, modulo how many there are
  ZeroVector<i64> handles_;  // of the live sequence at each place
  bool closed_ = false;
  ZeroVector<i64> opened_at_;  // by place, in ns; tells people how old a sequence is, and decides nothing
  ZeroVector<i32> free_;       // a ring of free places, oldest at head_; see free_at()
  i64 head_ = 0, free_count_ = 0;
  ZeroVector<Lengths> lengths_;  // [place][group]: read and written together in every step
};

}  // namespace kvmem
