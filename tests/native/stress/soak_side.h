// One allocator and the model of it: what ought to be, and the comparison with what is.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "soak_params.h"
#include "soak_router.h"

namespace kvmem_soak {

class Side {
 public:
  Side(const Params& params, const Promises& promises, i64 number, bool paged, std::shared_ptr<kvmem::PagePool> pool);

  // --- the model's part of what was done ---
  Live& add(i32 handle, i64 key);
  void remove(std::size_t which);
  // Takes over `cached` tokens of a prompt, as an admission does; what is left of it is the sequence's script.
  void take_cached(Live& live, const std::vector<i32>& prompt, i64 cached);
  // The tokens that come next, decided and written to memory: after a call has made room for them.
  void write_next(Live& live, i64 count, Random& random);
  void note_committed(Live& live, i64 count, bool told);
  // Writes the state of all tokens up to `tokens`, as a model does that has read them.
  void write_state(Live& live, i64 tokens);
  // Before a commit of the first `tokens` tokens, which says that the state has read no others: where some were cut
  // off, it is put back.
  void answer_for_state(Live& live, i64 tokens);
  void remember(const Live& live);  // as a prefix that was committed
  std::vector<i32> changed_ids(const Live& live, i64 count) const;
  bool can_tell(const Live& live, i64 count) const;

  // --- what is, against what ought to be: Failure where they differ ---
  void verify(const Live& live);          // lengths, and every byte it may read
  void verify_lengths(const Live& live);  // lengths only
  // Tokens from `from` on, and what kernels may load behind the last, as far as nobody has written it.
  void verify_finite(const Live& live, i64 from);
  void verify_all();    // all sequences, and that there are no others
  void verify_books();  // check(), statistics
  void verify_pins();
  void verify_found(const Live& live);  // that a live sequence's own prefix is found
  void verify_events(Random& random);
  void follow();  // the replica does what was done since
  u64 tables_digest();

  bool has_state() const { return state_group_ >= 0; }
  bool has_window() const { return has_window_; }
  i64 token_group() const { return token_group_; }
  i64 block_tokens() const { return geometry.groups[token_group_].block_tokens; }
  i64 unit() const { return kvmem::unit_tokens(geometry.groups[token_group_]); }  // what is found comes in these
  i64 window_front(i64 group, i64 committed) const {
    return kvmem::window_first(geometry.groups[group], geometry.tail_guard_tokens, committed);
  }
  i64 groups() const { return static_cast<i64>(geometry.groups.size()); }
  i64 found(const std::vector<i32>& ids, i64 key);  // what match() says of them and one token more

  const Params& params;
  const Promises& promises;
  const i64 number;
  const bool paged;
  kvmem::Geometry geometry;
  std::shared_ptr<kvmem::PagePool> pool, replica_pool;
  std::unique_ptr<kvmem::Allocator> cache, replica;
  std::vector<Live> live;
  std::vector<Pinned> pins;
  std::vector<Prefix> committed;  // some of what was committed at some time
  Router router;
  i64 taken_events = 0;  // the last batch of them
  u64 untold = 0;        // counts the tokens of which the allocator is not told
  i64 lookups = 0, hits = 0, limit_pages = 0;

 private:
  template <class Touch>
  void each_word(kvmem::Allocator& in, const Live& live, Touch touch, i64 from, bool states);
  void compare_finite(kvmem::Allocator& in, const Live& live, i64 from, const char* where);
  void compare_content(kvmem::Allocator& in, const Live& live, const char* where);
  std::string name(const Live& live) const;

  i64 token_group_ = 0, state_group_ = -1;
  bool has_window_ = false;
};

}  // namespace kvmem_soak
