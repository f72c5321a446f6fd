// What kernels are told of a step, and the step in one call.

#include <algorithm>
#include <numeric>

#include "cache.h"

namespace kvmem {

// A batch with padding rows reads the trash blocks.
void Cache::prepare_padding(i64 n, i64 g, i64 rows, const BatchBuffers& out) {
  if (rows > out.max_sequences) {
    throw SpecError("a batch of " + std::to_string(rows) + " rows does not fit buffers for " +
                    std::to_string(out.max_sequences));
  }
  if (rows <= n || table_->has_trash(g)) return;
  settle();
  Transaction tx(*pool_, *this);
  table_->back_trash(g, tx);
  tx.commit();
}

void Cache::refuse_step(i64 index, i64 g, i64 fresh) const {
  throw SpecError("a step of " + std::to_string(fresh) + " new tokens for sequence handle " +
                  std::to_string(sequences_.handle_of(index)) + ", which has " +
                  std::to_string(sequences_.tokens(index, g) - sequences_.committed(index, g)) + " reserved");
}

// For the sequences in indices_: every reserved token that is not committed is new, unless the caller says how many.
BatchSizes Cache::write_batch(i64 n, const i32* new_tokens, i64 g, i64 rows, const BatchBuffers& out,
                              BatchMarks& marks) const {
  const Growth growth = geometry_.groups[g].growth;
  const bool chosen = new_tokens && growth == Growth::token;
  const TableView view = table_->view(g);
  marks.begin(number_, g);
  try {
    BatchWriter writer(out, marks, geometry_.groups[g].block_tokens, geometry_.groups[g].row_tokens);
    for (i64 i = 0; i < n; ++i) {
      const i64 index = indices_[i], done = sequences_.committed(index, g), have = sequences_.tokens(index, g);
      const i64 fresh = chosen ? new_tokens[i] : growth == Growth::fixed ? 0 : have - done;
      const i64 length = chosen ? done + fresh : have;
      if (fresh < 0 || length > have) refuse_step(index, g, fresh);
      writer.add({sequences_.handle_of(index), length, fresh, sequences_.front(index, g), view.at(index)});
    }
    for (i64 i = n; i < rows; ++i) writer.pad();
    return writer.finish();
  } catch (...) {
    marks.clear();
    throw;
  }
}

BatchSizes Cache::fill(const i32* handles, i64 n, const i32* new_tokens, i64 group, i64 rows, const BatchBuffers& out,
                       BatchMarks& marks) {
  Lock lock = enter();
  check_group(group);
  const i64 g = group < 0 ? token_group_ : group;
  rows = std::max(rows, n);
  indices_.resize(n);
  for (i64 i = 0; i < n; ++i) indices_[i] = sequences_.index(handles[i]);
  prepare_padding(n, g, rows, out);
  return write_batch(n, new_tokens, g, rows, out, marks);
}

void Cache::take_back_room(const i32* counts, i64 n) {
  settle();
  Transaction tx(*pool_, *this);
  for (i64 i = 0; i < n; ++i) {
    for (i64 g = 0; g < groups_; ++g) {
      if (!grows(g, -1)) continue;
      const i64 have = sequences_.tokens(indices_[i], g);
      table_->shrink(indices_[i], g, have, have - counts[i], tx);
      set_length(indices_[i], g, have - counts[i], tx);
    }
  }
  tx.commit();
}

// Notes the sequences, what each has to commit, and the sizes of the batch after the step; true when nothing is to be
// decided: one group without a window, and room at hand for everyone.
bool Cache::plan_step(const i32* handles, const i32* counts, i64 n, BatchSizes* need) {
  const i64 g = token_group_, size = geometry_.groups[g].block_tokens, most = geometry_.groups[g].max_tokens;
  bool fast = groups_ == 1 && geometry_.groups[g].window_tokens == 0 && geometry_.zero != Zero::always &&
              geometry_.map_ahead_tokens == 0 && !pool_->recording;
  ++call_;
  indices_.resize(n);
  due_.resize(n);
  i64 blocks_most = 0, blocks_all = 0, fresh = 0;
  for (i64 i = 0; i < n; ++i) {
    const i64 index = indices_[i] = sequences_.index(handles[i]);
    check_once(index);
    const i64 have = sequences_.tokens(index, g), after = have + counts[i];
    due_[i] = static_cast<i32>(have - sequences_.committed(index, g));
    const i64 blocks = ceil_div(std::max(i64{0}, after), size);
    blocks_most = std::max(blocks_most, blocks);
    blocks_all += blocks;
    fresh += counts[i];
    fast = fast && counts[i] >= 0 && after <= most && table_->has_room(index, g, after);
  }
  need->max_tokens = blocks_most, need->indices = blocks_all, need->new_tokens = fresh;
  return fast;
}

// Everything that could be refused is refused before anything changes; to commit needs no memory.
BatchSizes Cache::step(const i32* handles, const i32* counts, i64 n, const i32* tokens, i64 num_tokens, i64 rows,
                       const BatchBuffers& out, BatchMarks& marks) {
  Lock lock = enter();
  rows = std::max(rows, n);
  BatchSizes need;
  const bool fast = plan_step(handles, counts, n, &need);
  const i64 due = std::accumulate(due_.begin(), due_.end(), i64{0});
  if (tokens && num_tokens != due) {
    throw SpecError("step: got " + std::to_string(num_tokens) + " token ids to commit, but " + std::to_string(due) +
                    " tokens are reserved and not committed");
  }
  if (need.max_tokens > out.max_blocks || need.indices + rows - n > out.max_indices ||
      need.new_tokens + rows - n > out.max_new_tokens) {
    throw SpecError("step: needs up to " + std::to_string(need.max_tokens) + " blocks for a sequence, " +
                    std::to_string(need.indices + rows - n) + " in all and " +
                    std::to_string(need.new_tokens + rows - n) + " new tokens; the batch was made for " +
                    std::to_string(out.max_blocks) + ", " + std::to_string(out.max_indices) + " and " +
                    std::to_string(out.max_new_tokens));
  }
  prepare_padding(n, token_group_, rows, out);
  if (!fast) make_room(handles, counts, n, -1);
  try {
    if (due > 0) commit_planned(due_.data(), n, -1, tokens);
  } catch (...) {  // only a driver can fail here
    if (!fast) take_back_room(counts, n);
    throw;
  }
  for (i64 i = 0; fast && i < n; ++i) sequences_.tokens(indices_[i], token_group_) += counts[i];
  const BatchSizes sizes = write_batch(n, nullptr, token_group_, rows, out, marks);
  leave();
  return sizes;
}

}  // namespace kvmem
