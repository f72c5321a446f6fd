// The undo log of a pool's transaction, for state that ops do not describe: marks, fences, and the order of lists. Each
// change is recorded before it is made, so that a failed transaction restores the exact state (invariant 5). Outside a
// transaction nothing is recorded.
#pragma once

#include <cstddef>
#include <vector>

#include "base/check.h"
#include "base/types.h"

namespace kvmem {

class IdList;
class ReadyBlocks;

class Journal {
 public:
  // The most entries that the application of one op makes.
  static constexpr std::size_t kPerRecord = 16;

  void open() {
    KVMEM_ASSERT(!open_ && size_ == 0, "a pool has one transaction at a time");
    open_ = true;
  }
  // Ends the transaction: its entries can no longer be undone.
  void close() {
    KVMEM_ASSERT(open_ && !restoring_, "a transaction is open, and not being undone");
    size_ = 0;
    open_ = false;
  }
  // While ops are undone, between begin_restoring() and end_restoring(), the journal and the lists ignore changes;
  // restore() then resets them.
  void begin_restoring() {
    KVMEM_ASSERT(open_ && !restoring_, "a transaction is open, and not being undone");
    restoring_ = true;
  }
  bool restoring() const { return restoring_; }
  // Undoes all entries but the first `size`, newest first.
  void restore(std::size_t size);
  void end_restoring() { restoring_ = false; }

  std::size_t size() const { return size_; }
  // Makes room, so that the next `more` entries need no memory. It may throw std::bad_alloc, as may every function that
  // records an entry; nothing has changed then.
  void reserve(std::size_t more) {
    if (entries_.size() - size_ < more) grow(more);
  }

  // Sets `place` to `value`. REQUIRES: `place` does not move before the transaction ends.
  template <class T>
  void set(T& place, T value) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 8, "a mark, or a number");
    if (place == value || restoring_) return;
    if (open_) note({sizeof(T) == 1 ? Kind::byte : Kind::number, 0, &place, static_cast<i64>(place)});
    place = value;
  }
  // Sets places[at] to `value`. The vector may grow meanwhile, but must not move.
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
    i64 at = 0;  // index or id; for a byte or number, its old value
  };
  void note(const Entry& entry) {
    reserve(1);
    entries_[size_++] = entry;
  }
  [[gnu::cold, gnu::noinline]] void grow(std::size_t more);

  std::vector<Entry> entries_;  // the first size_ are in use: a store is cheaper than a call of push_back()
  std::size_t size_ = 0;
  bool open_ = false, restoring_ = false;
};

}  // namespace kvmem
