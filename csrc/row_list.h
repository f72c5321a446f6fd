// A list of rows, the one added longest ago first. Row 0 shows the trash blocks and is never listed: it is the ring's
// head, and what first() and next() answer at the end. Nothing is allocated after construction, and nothing can fail.
#pragma once

#include <vector>

#include "types.h"

namespace kvmem {

class RowList {
 public:
  explicit RowList(i64 rows) : links_(rows) { links_[0] = {0, 0}; }

  bool has(i64 row) const { return links_[row].next >= 0; }
  i64 first() const { return links_[0].next; }
  i64 last() const { return links_[0].previous; }
  i64 next(i64 row) const { return links_[row].next; }
  i64 size() const { return size_; }
  void add_first(i64 row) { insert(row, 0, links_[0].next); }
  void add_last(i64 row) { insert(row, links_[0].previous, 0); }

  void remove(i64 row) {
    Link& link = links_[row];
    links_[link.previous].next = link.next;
    links_[link.next].previous = link.previous;
    link = Link();
    --size_;
  }

 private:
  struct Link {
    i32 next = -1, previous = -1;
  };

  void insert(i64 row, i32 previous, i32 next) {
    links_[row] = {next, previous};
    links_[previous].next = links_[next].previous = static_cast<i32>(row);
    ++size_;
  }

  std::vector<Link> links_;
  i64 size_ = 0;
};

}  // namespace kvmem
