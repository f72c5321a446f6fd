// What kernels are told of a step, and the step in one call.

#include <algorithm>

#include "cache.h"

namespace kvmem {

// What this step does for one sequence: every reserved token that is not committed, unless the caller says how many.
BatchRow Cache::row_of(i64 index, i64 g, const i32* new_tokens) const {
  const i64 done = sequences_.committed(index, g), have = sequences_.tokens(index, g);
  const Growth growth = geometry_.groups[g].growth;
  const bool chosen = new_tokens && growth == Growth::token;
  BatchRow row;
  row.handle = sequences_.handle_of(index);
  row.fresh = growth == Growth::fixed ? 0 : chosen ? *new_tokens : have - done;
  row.length = chosen ? done + row.fresh : have;
  if (row.fresh < 0 || row.length > have) {
    throw SpecError("a step of " + std::to_string(row.fresh) + " new tokens for sequence handle " +
                    std::to_string(row.handle) + ", which has " + std::to_string(have - done) + " reserved");
  }
  row.first = sequences_.front(index, g);
  row.at = table_->place(index, g);
  return row;
}

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

// For the sequences in indices_.
BatchSizes Cache::write_batch(i64 n, const i32* new_tokens, i64 g, i64 rows, const BatchBuffers& out,
                              BatchMarks& marks) const {
  try {
    BatchWriter writer(out, marks, geometry_.groups[g].block_tokens, geometry_.groups[g].row_tokens);
    for (i64 i = 0; i < n; ++i) writer.add(row_of(indices_[i], g, new_tokens ? new_tokens + i : nullptr));
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

// Everything that could be refused is refused before anything changes; to commit needs no memory.
BatchSizes Cache::step(const i32* handles, const i32* counts, i64 n, const i32* tokens, i64 num_tokens, i64 rows,
                       const BatchBuffers& out, BatchMarks& marks) {
  Lock lock = enter();
  const i64 g = token_group_, size = geometry_.groups[g].block_tokens;
  rows = std::max(rows, n);
  due_.resize(n);
  i64 due = 0;
  BatchSizes need;
  for (i64 i = 0; i < n; ++i) {
    const i64 index = sequences_.index(handles[i]), have = sequences_.tokens(index, g);
    due_[i] = static_cast<i32>(have - sequences_.committed(index, g));
    due += due_[i];
    const i64 blocks = ceil_div(have + counts[i], size);
    need.max_tokens = std::max(need.max_tokens, blocks);
    need.indices += blocks;
    need.new_tokens += counts[i];
  }
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
  prepare_padding(n, g, rows, out);
  make_room(handles, counts, n, -1);
  try {
    if (due > 0) commit_planned(due_.data(), n, -1, tokens);
  } catch (...) {  // only a driver can fail here
    take_back_room(counts, n);
    throw;
  }
  const BatchSizes sizes = write_batch(n, nullptr, g, rows, out, marks);
  leave();
  return sizes;
}

}  // namespace kvmem
