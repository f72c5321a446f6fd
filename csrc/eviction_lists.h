// Lists of block ids without allocation: a block stands in one list at most, and leaves it in O(1) without knowing
// which one it is. A list is a ring through its own sentinel, node `list`; block `id` is node `lists + id`.
#pragma once

#include <cassert>
#include <vector>

#include "types.h"

namespace kvmem {

class IdLists {
 public:
  explicit IdLists(i32 lists) : lists_(lists), links_(static_cast<std::size_t>(lists)) {
    for (i32 node = 0; node < lists; ++node) at(node) = {node, node};
  }

  void reserve(i64 ids) { links_.resize(static_cast<std::size_t>(lists_ + ids), Link{-1, -1}); }
  bool empty(i32 list) const { return at(list).next == list; }
  i32 front(i32 list) const { return at(list).next - lists_; }  // of a list that is not empty, as back()
  i32 back(i32 list) const { return at(list).prev - lists_; }
  bool contains(i32 id) const { return linked(lists_ + id); }

  void push_back(i32 list, i32 id) { link(lists_ + id, at(list).prev, list); }
  void push_front(i32 list, i32 id) { link(lists_ + id, list, at(list).next); }

  // Returns the list that became empty by it, or -1.
  i32 remove(i32 id) {
    const Link link = at(lists_ + id);
    assert(linked(lists_ + id));
    at(link.prev).next = link.next;
    at(link.next).prev = link.prev;
    return link.prev == link.next && link.prev < lists_ ? link.prev : -1;
  }

  // Takes the latest remove() of `id` back if its neighbours still stand side by side: true, and in the same place.
  bool undo_remove(i32 id) {
    const Link old = at(lists_ + id);  // remove() leaves the links of the removed node as they were
    if (old.prev < 0 || !linked(old.prev) || !linked(old.next) || at(old.prev).next != old.next) return false;
    link(lists_ + id, old.prev, old.next);
    return true;
  }

  // The list `id` stands at the front or back of by being alone in it; -1 when it has company.
  i32 alone_in(i32 id) const {
    const Link link = at(lists_ + id);
    return link.prev == link.next ? link.prev : -1;
  }

 private:
  struct Link {
    i32 prev, next;
  };

  Link& at(i32 node) { return links_[static_cast<std::size_t>(node)]; }
  const Link& at(i32 node) const { return links_[static_cast<std::size_t>(node)]; }
  bool linked(i32 node) const {
    const Link link = at(node);
    return link.prev >= 0 && at(link.prev).next == node && at(link.next).prev == node;
  }
  void link(i32 node, i32 prev, i32 next) {
    at(node) = {prev, next};
    at(prev).next = node;
    at(next).prev = node;
  }

  i32 lists_;
  std::vector<Link> links_;
};

}  // namespace kvmem
