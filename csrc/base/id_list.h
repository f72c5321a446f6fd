// A list of numbers above 0, the one added longest ago first. 0 is never listed (row 0 and block 0 are read-trash): it
// is the ring's head, and what first() and next() answer at the end. Its order is state, so every change is noted in
// the journal first, which may find no memory; nothing has changed then.
#pragma once

#include <vector>

#include "base/digest.h"
#include "base/journal.h"
#include "base/types.h"

namespace kvmem {

class IdList {
 public:
  explicit IdList(Journal& journal, i64 bound = 1) : journal_(&journal), links_(bound) { links_[0] = {0, 0}; }

  // Numbers below `bound` may be added from now on. Never shrinks.
  void reserve(i64 bound) {
    if (bound > static_cast<i64>(links_.size())) links_.resize(bound);
  }
  bool has(i64 id) const { return id > 0 && id < static_cast<i64>(links_.size()) && links_[id].next >= 0; }
  i64 first() const { return links_[0].next; }
  i64 last() const { return links_[0].previous; }
  i64 next(i64 id) const { return links_[id].next; }
  i64 size() const { return size_; }
  void add_first(i64 id) { add(id, 0, links_[0].next); }
  void add_last(i64 id) { add(id, links_[0].previous, 0); }
  void add_before(i64 listed, i64 id) { add(id, links_[listed].previous, static_cast<i32>(listed)); }

  void remove(i64 id) {
    if (journal_->restoring()) return;
    journal_->removed(*this, id, links_[id].next);
    take_out(id);
  }

  // For the journal: the latest change that still stands.
  void undo_add(i64 id) { take_out(id); }
  void undo_remove(i64 id, i32 before) { insert(id, links_[before].previous, before); }

  void digest(Hasher& hash) const {
    hash.add(size_);
    for (i64 id = first(); id != 0; id = next(id)) hash.add(id);
  }

 private:
  struct Link {
    i32 next = -1, previous = -1;
  };

  void add(i64 id, i32 previous, i32 next) {
    if (journal_->restoring()) return;
    journal_->added(*this, id);
    insert(id, previous, next);
  }

  void take_out(i64 id) {
    Link& link = links_[id];
    links_[link.previous].next = link.next;
    links_[link.next].previous = link.previous;
    link = Link();
    --size_;
  }

  void insert(i64 id, i32 previous, i32 next) {
    links_[id] = {next, previous};
    links_[previous].next = links_[next].previous = static_cast<i32>(id);
    ++size_;
  }

  Journal* journal_;
  std::vector<Link> links_;
  i64 size_ = 0;
};

}  // namespace kvmem
