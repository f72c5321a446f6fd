#include "allocator/room.h"

#include <algorithm>
#include <new>

namespace kvmem {

void Room::make(const StepPlan& plan, std::size_t* done, Transaction& tx) {
  if (groups_.is_simple()) {
    for (; *done < plan.needy.size(); ++*done) {
      const i64 i = plan.needy[*done], index = plan.indices[i], tokens = sequences_.tokens(index, 0);
      table_.grow(index, 0, tokens - plan.more[i], tokens, tx);
    }
    return;
  }
  for (; *done < plan.needy.size(); ++*done) {
    const i64 i = plan.needy[*done];
    make_one(plan.indices[i], plan.more[i], plan.group, tx);
  }
}

void Room::make_one(i64 index, i64 count, i64 group, Transaction& tx) {
  for (i64 g = groups_.begin(group); g < groups_.end(group); ++g) {
    if (groups_.grows(g, group)) {
      const i64 tokens = sequences_.tokens(index, g);
      table_.grow(index, g, tokens - count, tokens, tx);
      if (planner_.lacks_null_block(g, tokens)) table_.back_reserved(g, tx);
    } else if (groups_[g].growth == Growth::fixed && sequences_.tokens(index, g) == 0) {
      records_.set_tokens(index, g, 1, tx);
      table_.grow(index, g, 0, 1, tx);
      records_.set_committed(index, g, 1, tx);  // only now: a row that it comes to may be zeroed first
    }
  }
}

void Room::grow_to(i64 index, i64 tokens, i64 held, Transaction& tx) {
  for (i64 g = 0; g < groups_.count(); ++g) {
    if (groups_.grows(g, -1)) records_.set_tokens(index, g, tokens, tx);
  }
  make_one(index, tokens - held, -1, tx);
}

void Room::explain(const StepPlan& plan, std::size_t done, const OutOfMemory& why) const {
  if (plan.needy.empty()) throw why;
  const i64 i = plan.needy[std::min(done, plan.needy.size() - 1)], index = plan.indices[i];
  const i64 g = groups_.one(plan.group), have = sequences_.tokens(index, g);
  const i64 fits = table_.tokens_that_fit(index, g, pool_.available_pages(table_));
  throw OutOfMemory("asked to extend sequence handle " + std::to_string(sequences_.handle_of(index)) + " from " +
                    std::to_string(have) + " by " + std::to_string(plan.more[i]) + " tokens: " + why.what() +
                    "; alone it could grow by about " + std::to_string(std::max(i64{0}, fits - have)) +
                    ". Free or preempt a sequence, or raise the memory with set_memory()");
}

void Room::start_ahead(const i64* indices, i64 n, i64 group) {
  if (pool_.space() && !pool_.mapper().start()) return;
  try {
    decide_ahead(indices, n, group);
  } catch (const OutOfMemory&) {
    // Then every step maps for itself.
  } catch (const std::bad_alloc&) {
  }
}

void Room::decide_ahead(const i64* indices, i64 n, i64 group) {
  std::vector<i64> touched;
  touched.reserve(n);
  Transaction tx(pool_, tables_);
  for (i64 i = 0; i < n; ++i) {
    if (decide_one(indices[i], group, tx)) touched.push_back(indices[i]);
  }
  if (touched.empty()) return;
  tx.expect_deferred();
  i64 job = 0;
  if (pool_.space()) job = pool_.mapper().post(pool_.shared_space(), tx.ops());
  tx.commit_deferred();
  for (i64 index : touched) {
    if (job != 0) table_.set_pending(index, job);
  }
}

bool Room::decide_one(i64 index, i64 group, Transaction& tx) {
  bool any = false;
  for (i64 g = groups_.begin(group); g < groups_.end(group); ++g) {
    if (groups_[g].growth != Growth::token || !groups_.grows(g, group)) continue;
    const i64 have = sequences_.tokens(index, g);
    const i64 want = std::min(have + groups_.geometry().map_ahead_tokens, groups_[g].max_tokens);
    any = (!table_.has_room(index, g, want) && table_.map_ahead(index, g, have, tx)) || any;
  }
  return any;
}

}  // namespace kvmem
