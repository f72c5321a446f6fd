// Lists of block ids without allocation: a block stands in one list at most, and leaves it in O(1) without knowing
// which one it is. A list is a ring through its own sentinel, node `list`; block `id` is node `lists + id`. What else
// is known of a block may stand in its node too, on the same cache line.
#pragma once

#include <algorithm>
#include <cassert>
#include <vector>

#include "base/digest.h"
#include "base/types.h"

namespace kvmem {

struct IdNode {
  i32 prev = -1, next = -1;
};

template <class Node = IdNode>
class IdLists {
 public:
  explicit IdLists(i32 lists) : lists_(lists), nodes_(static_cast<std::size_t>(lists)) {
    for (i32 node = 0; node < lists; ++node) at(node).prev = at(node).next = node;
  }

  void reserve(i64 ids) {
    const std::size_t nodes = static_cast<std::size_t>(lists_ + ids);
    nodes_.reserve(nodes);  // resize() alone would take room for twice what there was
    nodes_.resize(nodes);
  }
  i64 ids() const { return static_cast<i64>(nodes_.size()) - lists_; }
  Node& operator[](i32 id) { return at(lists_ + id); }
  const Node& operator[](i32 id) const { return at(lists_ + id); }
  bool empty(i32 list) const { return at(list).next == list; }
  i32 front(i32 list) const { return at(list).next - lists_; }  // of a list that is not empty, as back()
  i32 back(i32 list) const { return at(list).prev - lists_; }

  void push_back(i32 list, i32 id) {
    keep_place(id);
    link(lists_ + id, at(list).prev, list);
  }
  void push_front(i32 list, i32 id) {
    keep_place(id);
    link(lists_ + id, list, at(list).next);
  }

  // Returns the list that became empty by it, or -1.
  i32 remove(i32 id) {
    assert(linked(lists_ + id));
    const i32 prev = at(lists_ + id).prev, next = at(lists_ + id).next;
    at(prev).next = next;
    at(next).prev = prev;
    return prev == next && prev < lists_ ? prev : -1;
  }

  // Takes the latest push of `id` back, in reverse order if there were several: out of its list, as remove() takes it.
  // Where it stood before counts again for undo_remove(), unless thousands were pushed since.
  i32 undo_push(i32 id) {
    const i32 emptied = remove(id);
    std::size_t back = 1;  // what was pushed later is gone again without undo_push()
    while (back <= known_ && pushes_[(pushed_ - back) % kPushes].id != id) ++back;
    if (back > known_) return emptied;
    pushed_ -= back, known_ -= back;
    const Push& before = pushes_[pushed_ % kPushes];
    at(lists_ + id).prev = before.prev, at(lists_ + id).next = before.next;
    return emptied;
  }

  // Takes the latest remove() of `id` back if its neighbours still stand side by side: true, and in the same place.
  bool undo_remove(i32 id) {
    const i32 prev = at(lists_ + id).prev, next = at(lists_ + id).next;  // remove() leaves them as they were
    if (prev < 0 || !linked(prev) || !linked(next) || at(prev).next != next) return false;
    link(lists_ + id, prev, next);
    return true;
  }

  // The list that `id` was the first of, or the last of, before its latest remove(); else -1. Where several left a list
  // at one end, and some of them not at all come back, that still says where the others stood.
  i32 was_first_of(i32 id) const { return sentinel(at(lists_ + id).prev); }
  i32 was_last_of(i32 id) const { return at(lists_ + id).prev < 0 ? -1 : sentinel(at(lists_ + id).next); }

  // No undo_remove() of `id` from now on: it is another list that it comes to.
  void forget_place(i32 id) { at(lists_ + id).prev = -1; }

  // Adds the ids of a list, in its order.
  void digest(i32 list, Hasher& hash) const {
    for (i32 node = at(list).next; node != list; node = at(node).next) hash.add(node - lists_);
    hash.add(-1);
  }

  // The list `id` stands at the front or back of by being alone in it; -1 when it has company.
  i32 alone_in(i32 id) const {
    const Node& node = at(lists_ + id);
    return node.prev == node.next ? node.prev : -1;
  }

 private:
  // A push, and the links that it has overwritten.
  struct Push {
    i32 id, prev, next;
  };
  static constexpr std::size_t kPushes = 4096;
  void keep_place(i32 id) {
    pushes_[pushed_++ % kPushes] = {id, at(lists_ + id).prev, at(lists_ + id).next};
    known_ = std::min(known_ + 1, kPushes);
  }
  Node& at(i32 node) { return nodes_[static_cast<std::size_t>(node)]; }
  const Node& at(i32 node) const { return nodes_[static_cast<std::size_t>(node)]; }
  i32 sentinel(i32 node) const { return node < lists_ ? node : -1; }
  bool linked(i32 node) const {
    const i32 prev = at(node).prev, next = at(node).next;
    return prev >= 0 && at(prev).next == node && at(next).prev == node;
  }
  void link(i32 node, i32 prev, i32 next) {
    at(node).prev = prev;
    at(node).next = next;
    at(prev).next = node;
    at(next).prev = node;
  }

  i32 lists_;
  std::vector<Node> nodes_;
  std::vector<Push> pushes_{kPushes};  // the latest ones, in a ring
  std::size_t pushed_ = 0, known_ = 0;
};

}  // namespace kvmem
