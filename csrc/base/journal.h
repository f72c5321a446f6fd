// What a decision changes beside its records: marks, fences, and places in lists whose order says what comes next. Each
// change is noted here before it is made, so that a transaction that is taken back restores them exactly (invariant 5).
// Of one pool, as its transactions are. Outside of a transaction nothing is noted.
#pragma once

#include <cstddef>
#include <vector>

#include "base/types.h"

namespace kvmem {

class IdList;
class ReadyBlocks;

class Journal {
 public:
  // The most entries that applying one record makes.
  static constexpr std::size_t kPerRecord = 16;

  void open() { open_ = true; }
  // Nothing is taken back any more.
  void close() {
    size_ = 0;
    open_ = false;
  }
  // While records are taken back: lists and marks stay as they are, and restore() does them afterwards.
  void begin_restoring() { restoring_ = true; }
  bool restoring() const { return restoring_; }
  // Takes back what was noted since there were `size` entries, the newest first.
  void restore(std::size_t size);
  void end_restoring() { restoring_ = false; }

  std::size_t size() const { return size_; }
  // The next `more` entries need no memory. May throw; all else that notes one entry may, and has changed nothing then.
  void reserve(std::size_t more) {
    if (entries_.size() - size_ < more) grow(more);
  }

  // `place` becomes `value`. It must stay where it is until the transaction ends.
  template <class T>
  void set(T& place, T value) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 8, "a mark, or a number");
    if (place == value || restoring_) return;
    if (open_) note({sizeof(T) == 1 ? Kind::byte : Kind::number, 0, &place, static_cast<i64>(place)});
    place = value;
  }
  // The same of one of `places`, which may grow.
  void set(std::vector<i32>& places, i64 at, i32 value) {
    if (places[at] == value) return;
    if (open_) note({Kind::element, places[at], &places, at});
    places[at] = value;
  }
  void added(IdList& list, i64 id) {
    if (open_) note({Kind::added, 0, &list, id});
  }
  void removed(IdList& list, i64 id, i32 before) {
    if (open_) note({Kind::removed, before, &list, id});
  }
  void moved(ReadyBlocks& blocks, i64 block, bool was_late) {
    if (open_) note({Kind::ready, was_late, &blocks, block});
  }

 private:
  enum class Kind : std::uint8_t { byte, number, element, added, removed, ready };
  struct Entry {
    Kind kind = Kind::byte;
    i32 old = 0;
    void* where = nullptr;
    i64 at = 0;  // or the old number
  };
  void note(const Entry& entry) {
    reserve(1);
    entries_[size_++] = entry;
  }
  [[gnu::cold, gnu::noinline]] void grow(std::size_t more);

  std::vector<Entry> entries_;  // the first size_ count: to add one is a store, where push_back() is a call
  std::size_t size_ = 0;
  bool open_ = false, restoring_ = false;
};

}  // namespace kvmem
