// A doubly linked list of ids above 0, oldest first. Id 0 is never listed (row 0 and block 0 belong to no sequence): it
// is the ring's head, so first() and next() return 0 at the end. The order of the list is state, so each change is
// recorded in the journal before it is made. Recording may throw std::bad_alloc; the list is then unchanged.
#pragma once

#include <vector>

#include "base/check.h"
#include "base/digest.h"
#include "base/journal.h"
#include "base/types.h"

namespace kvmem {

class IdList {
 public:
  explicit IdList(Journal& journal, i64 bound = 1) : journal_(&journal), links_(bound) { links_[0] = {0, 0}; }

  // Allows ids below `bound` from now on. Never shrinks.
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
    KVMEM_ASSERT(has(id), "only a listed id can be removed");
    if (journal_->restoring()) return;
    journal_->removed(*this, id, links_[id].next);
    take_out(id);
  }

  // Called by the journal to undo the latest change that is not undone yet.
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
    KVMEM_ASSERT(id > 0 && id < static_cast<i64>(links_.size()) && !has(id), "the id is in bounds and not listed yet");
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
