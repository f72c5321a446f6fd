// Doubly linked lists of block ids that never allocate outside reserve(). A block is in one list at most, and remove()
// takes O(1) without a search for the list. Each list is a ring through its sentinel: node `list` is the sentinel, node
// `lists + id` stands for block `id`. A Node may hold more data of its block, which then shares the cache line.
#pragma once

#include <algorithm>
#include <vector>

#include "base/check.h"
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
    nodes_.reserve(nodes);  // resize() alone would double the capacity
    nodes_.resize(nodes);
  }
  i64 ids() const { return static_cast<i64>(nodes_.size()) - lists_; }
  Node& operator[](i32 id) { return at(lists_ + id); }
  const Node& operator[](i32 id) const { return at(lists_ + id); }
  bool empty(i32 list) const { return at(list).next == list; }
  i32 front(i32 list) const { return at(list).next - lists_; }  // REQUIRES: the list is not empty; likewise back()
  i32 back(i32 list) const { return at(list).prev - lists_; }

  void push_back(i32 list, i32 id) {
    KVMEM_ASSERT(!linked(lists_ + id), "a block is in one list at most");
    keep_place(id);
    link(lists_ + id, at(list).prev, list);
  }
  void push_front(i32 list, i32 id) {
    KVMEM_ASSERT(!linked(lists_ + id), "a block is in one list at most");
    keep_place(id);
    link(lists_ + id, list, at(list).next);
  }

  // Returns the list that became empty, or -1. The links of `id` keep their values, for undo_remove().
  i32 remove(i32 id) {
    KVMEM_ASSERT(linked(lists_ + id), "only a listed block can be removed");
    const i32 prev = at(lists_ + id).prev, next = at(lists_ + id).next;
    at(prev).next = next;
    at(next).prev = prev;
    return prev == next && prev < lists_ ? prev : -1;
  }

  // Undoes the latest push of `id`, and returns the list that became empty, or -1. Pushes are undone newest first. The
  // links that the push overwrote are restored for undo_remove(), unless thousands of pushes happened since.
  i32 undo_push(i32 id) {
    const i32 emptied = remove(id);
    std::size_t back = 1;  // skips later pushes whose blocks were removed without undo_push()
    while (back <= known_ && pushes_[(pushed_ - back) % kPushes].id != id) ++back;
    if (back > known_) return emptied;
    pushed_ -= back, known_ -= back;
    const Push& before = pushes_[pushed_ % kPushes];
    at(lists_ + id).prev = before.prev, at(lists_ + id).next = before.next;
    return emptied;
  }

  // Undoes the latest remove() of `id` and returns true; returns false, and changes nothing, where its former
  // neighbours are no longer adjacent.
  bool undo_remove(i32 id) {
    KVMEM_ASSERT(!linked(lists_ + id), "a block is in one list at most");
    const i32 prev = at(lists_ + id).prev, next = at(lists_ + id).next;  // remove() left them unchanged
    if (prev < 0 || !linked(prev) || !linked(next) || at(prev).next != next) return false;
    link(lists_ + id, prev, next);
    return true;
  }

  // Return the list of which `id` was the first, or the last, block before its latest remove(); otherwise -1. They say
  // where to reinsert a block whose former neighbours are gone.
  i32 was_first_of(i32 id) const { return sentinel(at(lists_ + id).prev); }
  i32 was_last_of(i32 id) const { return at(lists_ + id).prev < 0 ? -1 : sentinel(at(lists_ + id).next); }

  // Makes undo_remove() of `id` return false, because the block will enter another list.
  void forget_place(i32 id) { at(lists_ + id).prev = -1; }

  // Adds the ids of a list to `hash`, in order.
  void digest(i32 list, Hasher& hash) const {
    for (i32 node = at(list).next; node != list; node = at(node).next) hash.add(node - lists_);
    hash.add(-1);
  }

  // Returns the list of which `id` is the only block, or -1. REQUIRES: `id` is in a list.
  i32 alone_in(i32 id) const {
    const Node& node = at(lists_ + id);
    return node.prev == node.next ? node.prev : -1;
  }

 private:
  // One push, with the links that it overwrote.
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
  std::vector<Push> pushes_{kPushes};  // ring of the latest pushes
  std::size_t pushed_ = 0, known_ = 0;
};

}  // namespace kvmem
