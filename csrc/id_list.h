// A list of numbers above 0, the one added longest ago first. 0 is never listed (row 0 and block 0 are read-trash): it
// is the ring's head, and what first() and next() answer at the end. Nothing is allocated but by reserve(), and nothing
// can fail.
#pragma once

#include <vector>

#include "types.h"

namespace kvmem {

class IdList {
 public:
  explicit IdList(i64 bound = 1) : links_(bound) { links_[0] = {0, 0}; }

  // Numbers below `bound` may be added from now on. Never shrinks.
  void reserve(i64 bound) {
    if (bound > static_cast<i64>(links_.size())) links_.resize(bound);
  }
  bool has(i64 id) const { return id > 0 && id < static_cast<i64>(links_.size()) && links_[id].next >= 0; }
  i64 first() const { return links_[0].next; }
  i64 last() const { return links_[0].previous; }
  i64 next(i64 id) const { return links_[id].next; }
  i64 size() const { return size_; }
  void add_first(i64 id) { insert(id, 0, links_[0].next); }
  void add_last(i64 id) { insert(id, links_[0].previous, 0); }
  void add_before(i64 listed, i64 id) { insert(id, links_[listed].previous, static_cast<i32>(listed)); }

  void remove(i64 id) {
    Link& link = links_[id];
    links_[link.previous].next = link.next;
    links_[link.next].previous = link.previous;
    link = Link();
    --size_;
  }

 private:
  struct Link {
    i32 next = -1, previous = -1;
  };

  void insert(i64 id, i32 previous, i32 next) {
    links_[id] = {next, previous};
    links_[previous].next = links_[next].previous = static_cast<i32>(id);
    ++size_;
  }

  std::vector<Link> links_;
  i64 size_ = 0;
};

}  // namespace kvmem
