// A router that follows the events of one allocator, believes each of them, and predicts what match() finds.
#pragma once

#include <unordered_map>

#include "soak_model.h"

namespace kvmem_soak {

class Router {
 public:
  explicit Router(const kvmem::Geometry& geometry) : geometry_(geometry) {}

  // Failure where an event contradicts what was told before.
  void follow(const kvmem::EventRecords& records, const std::unordered_map<i32, kvmem::PrefixKey>& roots);
  // True if no group needs anything of these tokens. Then no event says whether they are known still.
  bool needs_nothing(i64 tokens) const;
  // How many of these tokens are cached, counted in whole blocks.
  i64 predict(const std::vector<i32>& ids, const kvmem::PrefixKey& key, i64 block_tokens) const;

 private:
  void store(const kvmem::EventRecords& records, i64 i, const i32* tokens,
             const std::unordered_map<i32, kvmem::PrefixKey>& roots);
  static u64 root_chain(const kvmem::PrefixKey& key);
  static u64 chain_after(u64 before, const i32* tokens, i64 count);

  const kvmem::Geometry& geometry_;
  std::unordered_map<i32, u64> chains_;  // node -> its block and all before it
  std::unordered_map<u64, u64> held_;    // chain -> one bit for each group that holds it
};

}  // namespace kvmem_soak
