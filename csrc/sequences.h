// Sequences: handles and lengths. A handle is an int32: the low bits number a place in the table, the high bits count
// its tenants, so that a handle kept after free() is recognised (invariant 8). Places are reused oldest first, so a
// handle comes round again only after 2^31 / max_sequences tenancies of its place.
#pragma once

#include <string>
#include <vector>

#include "digest.h"
#include "ops.h"

namespace kvmem {

class Sequences {
 public:
  struct Lengths {
    i64 tokens = 0, committed = 0, front = 0;
  };

  Sequences(i64 max_sequences, i64 groups)
      : groups_(groups),
        tenants_(max_sequences, 0),
        handles_(max_sequences, kNone),
        free_(max_sequences),
        lengths_(max_sequences * groups) {
    while ((i64{1} << bits_) < max_sequences) ++bits_;
    for (i64 i = 0; i < max_sequences; ++i) free_[i] = static_cast<i32>(i);
    free_count_ = max_sequences;
  }

  i64 capacity() const { return static_cast<i64>(handles_.size()); }
  i64 count() const { return capacity() - free_count_; }
  bool live(i64 index) const { return handles_[index] != kNone; }
  i64 handle_of(i64 index) const { return (i64{tenants_[index]} << bits_) | index; }

  // The place a handle stands for. StaleHandle when it was freed or never given out.
  i64 index(i64 handle) const {
    const i64 index = handle & ((i64{1} << bits_) - 1);
    if (index >= capacity() || handles_[index] != handle) throw_stale(handle);
    return index;
  }

  // Of one group; of the next sequence, as many entries on as there are groups. For loops over many.
  Lengths* lengths(i64 group, i64 index) { return &lengths_[index * groups_ + group]; }
  const Lengths* lengths(i64 group, i64 index) const { return &lengths_[index * groups_ + group]; }

  // The place of a handle that is live, or was.
  i64 place_of(i64 handle) const { return handle & ((i64{1} << bits_) - 1); }

  // The handle the next sequence gets. OutOfMemory when all places are taken.
  i64 next_handle() const {
    if (free_count_ == 0) {
      throw OutOfMemory("asked for one more sequence; all " + std::to_string(capacity()) +
                        " are in use: free one, or raise max_sequences");
    }
    return (next_tenant(free_[head_]) << bits_) | free_[head_];
  }

  void on_open(i64 handle, bool undo) {
    const i64 index = handle & ((i64{1} << bits_) - 1);
    if (undo) {
      tail_pop();
    } else {
      if (free_count_ == 0 || next_handle() != handle) throw SpecError("open: not the handle that comes next");
      tenants_[index] = static_cast<i32>(handle >> bits_);
      head_ = (head_ + 1) % capacity();
      --free_count_;
    }
    handles_[index] = handle;
  }

  void on_close(i64 handle, bool undo) {
    const i64 place = index(handle);
    handles_[place] = kNone;
    if (undo) {
      tenants_[place] = static_cast<i32>(previous_tenant(place));
      head_ = (head_ + capacity() - 1) % capacity();
      free_[head_] = static_cast<i32>(place);
    } else {
      free_[(head_ + free_count_) % capacity()] = static_cast<i32>(place);
    }
    ++free_count_;
  }

  // Per group: tokens held or reserved, how many of them are valid, and the first one still kept (windows).
  i64& tokens(i64 index, i64 group) { return lengths_[index * groups_ + group].tokens; }
  i64& committed(i64 index, i64 group) { return lengths_[index * groups_ + group].committed; }
  i64& front(i64 index, i64 group) { return lengths_[index * groups_ + group].front; }
  i64 tokens(i64 index, i64 group) const { return lengths_[index * groups_ + group].tokens; }
  i64 committed(i64 index, i64 group) const { return lengths_[index * groups_ + group].committed; }
  i64 front(i64 index, i64 group) const { return lengths_[index * groups_ + group].front; }

  void digest(Hasher& hash) const {
    hash.add_all(tenants_);
    hash.add_all(handles_);
    for (i64 i = 0; i < free_count_; ++i) hash.add(free_[(head_ + i) % capacity()]);
    for (const Lengths& l : lengths_) hash.add(l.tokens, l.committed, l.front);
  }

 private:
  i64 last_tenant() const { return ((i64{1} << 31) >> bits_) - 1; }
  i64 next_tenant(i64 index) const { return tenants_[index] >= last_tenant() ? 1 : tenants_[index] + 1; }
  i64 previous_tenant(i64 index) const { return tenants_[index] - 1; }
  void tail_pop() { --free_count_; }
  [[noreturn]] void throw_stale(i64 handle) const {
    throw StaleHandle("sequence handle " + std::to_string(handle) +
                      " is not live: it was freed, or this allocator never gave it out");
  }

  const i64 groups_;
  int bits_ = 0;
  static constexpr i64 kNone = INT64_MIN;  // no int32 handle

  std::vector<i32> tenants_;
  std::vector<i64> handles_;  // of the live sequence at each place
  std::vector<i32> free_;     // a ring of free places, oldest at head_
  i64 head_ = 0, free_count_ = 0;
  std::vector<Lengths> lengths_;  // [place][group]: read and written together in every step
};

}  // namespace kvmem
