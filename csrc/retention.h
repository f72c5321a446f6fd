#pragma once
#include <list>
#include <unordered_map>
#include "eviction.h"
namespace kvmem {
class RetentionPolicy {
 public:
  explicit RetentionPolicy(std::unique_ptr<EvictionPolicy> p) : b(std::move(p)) {}
  void reserve(i64 n) { b->reserve(n); }
  void insert(i32 i, std::uint64_t k, i32 p, i64 o) { b->insert(i, k, p, o); }
  void hit(i32 i) { b->hit(i); }
  void use(i32 i) { b->use(i); }
  void release(i32 i) { b->release(i); }
  i32 victim() { return b->victim(); }
  void evict(i32 i) { b->evict(i); }
  void restore(i32 i) { b->restore(i); }
  void retain(i32, int, double) {}
  std::unique_ptr<EvictionPolicy> b;
};
}  // namespace kvmem
