// Ids for an eviction policy over contents that come and go in any order. A policy wants to know which content a
// content follows, whether that one is there or not (eviction/policy.h, insert()). So a key has an id while anything
// uses it: its content, or a content that follows it.
//
// A hash table with chains whose size is fixed, so that no call but the constructor allocates.
#pragma once

#include <vector>

#include "base/check.h"
#include "base/types.h"

namespace kvmem {

class ContentIds {
 public:
  explicit ContentIds(i64 ids) : entries_(static_cast<std::size_t>(ids)) {
    std::size_t buckets = 1;
    while (buckets < entries_.size()) buckets *= 2;
    buckets_.assign(buckets, -1);
    for (i32 id = static_cast<i32>(ids); id-- > 0;) put_first(&free_, id);
  }

  i64 ids() const { return static_cast<i64>(entries_.size()); }
  // Returns the id of the key, -1 if nothing uses it.
  i32 find(std::uint64_t key) const {
    i32 id = buckets_[bucket(key)];
    while (id >= 0 && entry(id).key != key) id = entry(id).next;
    return id;
  }
  // Counts one more use, and returns the id. REQUIRES: fewer than ids() keys are in use, or this one is.
  i32 use(std::uint64_t key) {
    i32 id = find(key);
    if (id < 0) {
      KVMEM_ASSERT(free_ >= 0, "there is an id for each content, and for the one that it follows");
      id = free_;
      free_ = entry(id).next;
      entry(id).key = key;
      put_first(&buckets_[bucket(key)], id);
    }
    ++entry(id).uses;
    return id;
  }
  // Counts one use fewer; the last one frees the id.
  void drop(i32 id) {
    if (--entry(id).uses > 0) return;
    i32* link = &buckets_[bucket(entry(id).key)];
    while (*link != id) link = &entry(*link).next;
    *link = entry(id).next;
    put_first(&free_, id);
  }

 private:
  struct Entry {
    std::uint64_t key = 0;
    i32 uses = 0, next = -1;  // in the bucket, or among the free ones
  };
  std::size_t bucket(std::uint64_t key) const { return key & (buckets_.size() - 1); }
  Entry& entry(i32 id) { return entries_[static_cast<std::size_t>(id)]; }
  const Entry& entry(i32 id) const { return entries_[static_cast<std::size_t>(id)]; }
  void put_first(i32* head, i32 id) {
    entry(id).next = *head;
    *head = id;
  }

  std::vector<Entry> entries_;
  std::vector<i32> buckets_;
  i32 free_ = -1;
};

}  // namespace kvmem
