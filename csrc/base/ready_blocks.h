// The ready blocks of a group: backed, and nobody refers to them. The lowest is given out first, so that what is in use
// stays together; those put off come after all others.
#pragma once

#include <algorithm>
#include <numeric>

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
  // The next one; there is one.
  i64 first() const { return soon_.empty() ? late_.first() : soon_.first(); }

  // How many come next, on end: `first` is the next one. At least one.
  i64 run(i64 first) const { return (soon_.empty() ? late_ : soon_).run(first); }

  // And it is not ready any more.
  i64 take_first() {
    const bool soon = !soon_.empty();
    if (!soon) note(late_.first(), true);
    --size_;
    return (soon ? soon_ : late_).take_first();
  }
  // remove() of so many needs no memory.
  void expect(i64 blocks) {
    if (!late_.empty()) journal_->reserve(static_cast<std::size_t>(blocks));
  }

  // Writes the next `most` of them, or all there are; returns how many.
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
    soon_.insert(block);
    ++size_;
  }
  void remove(i64 block) {
    const bool soon = soon_.has(block);
    if (!soon) note(block, true);
    (soon ? soon_ : late_).erase(block);
    --size_;
  }
  // The `count` blocks from `first` on.
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
  }
  void put_off(i64 block) {
    if (late_.has(block)) return;
    note(block, false);
    soon_.erase(block);
    late_.insert(block);
  }

  // For the journal: it was put off, or was not, if it is ready again.
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
