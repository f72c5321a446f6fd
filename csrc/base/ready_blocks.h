// The ready blocks of a group: they have physical memory, and nothing refers to them. The lowest id is handed out
// first, which keeps used blocks together; deferred blocks (put_off()) come after all others.
#pragma once

#include <algorithm>
#include <numeric>

#include "base/check.h"
#include "base/digest.h"
#include "base/id_set.h"
#include "base/journal.h"

namespace kvmem {

class ReadyBlocks {
 public:
  explicit ReadyBlocks(Journal& journal) : journal_(&journal) {}
  void reserve(i64 bound) { soon_.reserve(bound), late_.reserve(bound); }
  bool empty() const { return size_ == 0; }
  i64 size() const { return size_; }
  bool has(i64 block) const { return soon_.has(block) || late_.has(block); }
  // Returns the block that take_first() would take. REQUIRES: not empty().
  i64 first() const { return soon_.empty() ? late_.first() : soon_.first(); }

  // Returns how many consecutive blocks, at least one, are handed out from `first` on. REQUIRES: `first` is first().
  i64 run(i64 first) const { return (soon_.empty() ? late_ : soon_).run(first); }

  // Removes and returns the first block. REQUIRES: not empty().
  i64 take_first() {
    KVMEM_ASSERT(size_ > 0, "there is a ready block");
    const bool soon = !soon_.empty();
    if (!soon) note(late_.first(), true);
    --size_;
    return (soon ? soon_ : late_).take_first();
  }
  // Makes room in the journal, so that the removal of `blocks` blocks needs no memory. May throw std::bad_alloc.
  void expect(i64 blocks) {
    if (!late_.empty()) journal_->reserve(static_cast<std::size_t>(blocks));
  }

  // Writes the next `most` blocks, or all if there are fewer; returns how many.
  i64 copy(i64 most, i32* out) const {
    i64 done = 0;
    for (const IdSet* set : {&soon_, &late_}) {
      for (i64 block = set->empty() ? -1 : set->first(); block >= 0 && done < most;) {
        const i64 n = std::min(set->run(block), most - done);
        std::iota(out + done, out + done + n, static_cast<i32>(block));
        done += n;
        block = done < most ? set->after(block + n - 1) : -1;
      }
    }
    return done;
  }

  void add(i64 block) {
    KVMEM_ASSERT(!has(block), "the block is not ready yet");
    soon_.insert(block);
    ++size_;
  }
  void remove(i64 block) {
    KVMEM_ASSERT(has(block), "only a ready block can be removed");
    const bool soon = soon_.has(block);
    if (!soon) note(block, true);
    (soon ? soon_ : late_).erase(block);
    --size_;
  }
  // The same for the `count` blocks from `first` on.
  void add(i64 first, i64 count) {
    soon_.insert(first, count);
    size_ += count;
  }
  void remove(i64 first, i64 count) {
    soon_.erase(first, count);
    for (i64 block = first; !late_.empty() && block < first + count; ++block) {
      if (!late_.has(block)) continue;
      note(block, true);
      late_.erase(block);
    }
    size_ -= count;
    KVMEM_ASSERT(size_ >= 0, "all of these blocks were ready");
  }
  void put_off(i64 block) {
    KVMEM_ASSERT(has(block), "only a ready block can be deferred");
    if (late_.has(block)) return;
    note(block, false);
    soon_.erase(block);
    late_.insert(block);
  }

  // Called by the journal: restores whether the block was deferred, if it is still ready.
  void undo_move(i64 block, bool late) {
    if (!has(block)) return;
    (late ? soon_ : late_).erase(block);
    (late ? late_ : soon_).insert(block);
  }

  void digest(Hasher& hash) const {
    for (const IdSet* set : {&soon_, &late_}) {
      for (i64 block = set->empty() ? -1 : set->first(); block >= 0; block = set->after(block)) hash.add(block);
      hash.add(-1);
    }
  }

 private:
  void note(i64 block, bool was_late) {
    if (!journal_->restoring()) journal_->moved(*this, block, was_late);
  }

  Journal* journal_;
  IdSet soon_, late_;
  i64 size_ = 0;
};

}  // namespace kvmem
