// A world: one allocator or two on one pool, and random operations on them. What operation i does follows from the
// world's seed, i, and what there is then; so operations can be left out to find the few that matter.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "soak_side.h"

namespace kvmem_soak {

constexpr int kOperations = 27;
i64 usual_weight(int operation);

// What the world has come to, for whoever reports a failure or a crash.
struct Progress {
  i64 operation = 0, operations = 0, refused = 0, hits = 0, evicted = 0, faults = 0, poisoned = 0;
};

class World {
 public:
  World(const Params& params, const Promises& promises, Progress& progress, bool trace);

  void step(i64 operation, bool check);                   // check: everything is compared after it
  void settle();                                          // no driver call fails any more, and none is on its way
  bool poisoned() const { return pool_->is_poisoned(); }  // undoing failed: the world ends here
  void finish();                                          // all is freed, and nothing is left
  void finish_poisoned();  // every call is refused, and the ends of the allocators and of the pool leave nothing

 private:
  using Member = void (World::*)(Random&);
  struct Entry {
    const char* name;
    Member run;
    i64 weight;
  };
  static const std::array<Entry, kOperations>& entries();
  friend i64 usual_weight(int operation);

  enum class Outcome { done, short_of_memory, refused, failed };
  // Calls; after a refusal, everything is compared with what it was. `may_refuse`: SpecError would be right.
  Outcome call(Random& random, bool may_refuse, const std::function<void()>& what);
  void unchanged(Random& random, const std::string& why);
  void after_refusal(Random& random, Outcome outcome);
  void note(const std::string& what);

  void open(Random& random);
  void admit(Random& random);
  void admit_batch(Random& random);
  void extend(Random& random);
  void extend_one(Random& random);
  void extend_batch(Random& random);
  void step_batch(Random& random);
  void advance(Random& random);
  void commit(Random& random);
  void commit_batch(Random& random);
  void truncate(Random& random);
  void fork(Random& random);
  void free_one(Random& random);
  void free_batch(Random& random);
  void pin(Random& random);
  void unpin(Random& random);
  void retain(Random& random);
  void snapshot(Random& random);
  void match(Random& random);
  void clear_cache(Random& random);
  void trim(Random& random);
  void set_memory(Random& random);
  void compact(Random& random);
  void drain(Random& random);
  void verify(Random& random);
  void illegal(Random& random);
  void fault(Random& random);
  void verify_everything();
  void look_at_all();  // nothing that lives or is pinned has changed

  Live* any(Random& random);  // null if there is none
  std::vector<i32> prompt(Random& random);
  i64 draw_count(Random& random, const Live& live) const;
  i64 any_key(Random& random) const { return random.one_in(4) ? random.below(2 * params_.salts) : 0; }
  // Admits, and compares what was found with what match() said.
  void admitted(Random& random, i32 handle, i64 key, const std::vector<i32>& prompt, i64 cached, i64 foretold);
  void release(Random& random, Live& live);
  void committed(Live& live, i64 count, bool told);
  void check_batch(const std::vector<Live*>& rows, const std::vector<i32>& counts);
  std::vector<Live*> some(Random& random);
  void kept(Random& random, i64 pin, i64 pinned, i64 key, const std::vector<i32>& ids);
  bool has_memory_to_spare() const;

  const Params& params_;
  const Promises promises_;
  Progress& progress_;
  const bool trace_;
  std::shared_ptr<kvmem::CheckedDriver> driver_;
  std::shared_ptr<kvmem::PagePool> pool_;
  std::vector<std::unique_ptr<Side>> sides_;
  Side* side_ = nullptr;  // of the operation in progress
  std::vector<std::vector<i32>> prompts_;
  i64 total_weight_ = 0;
  // One set of buffers for all steps: each meets what another one left.
  std::vector<i32> table_, lengths_;
  std::vector<i64> slots_;
  kvmem::BatchBuffers out_;
  std::unique_ptr<kvmem::BatchMarks> marks_;
};

}  // namespace kvmem_soak
