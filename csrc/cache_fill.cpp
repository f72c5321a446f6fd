// What kernels are told of a step, and the step in one call.

#include <algorithm>
#include <numeric>

#include "cache.h"

namespace kvmem {

void Cache::check_rows(i64 rows, const BatchBuffers& out) const {
  if (rows > out.max_sequences) {
    throw SpecError("a batch of " + std::to_string(rows) + " rows does not fit buffers for " +
                    std::to_string(out.max_sequences));
  }
}

// A batch with padding rows reads the trash blocks.
void Cache::prepare_padding(i64 n, i64 g, i64 rows) {
  if (rows <= n || table_->has_trash(g)) return;
  settle();
  Transaction tx(*pool_, *this);
  table_->back_trash(g, tx);
  tx.commit();
}

void Cache::refuse_step(i64 handle, i64 g, i64 fresh) const {
  const i64 index = sequences_.index(handle);
  throw SpecError("a step of " + std::to_string(fresh) + " new tokens for sequence handle " + std::to_string(handle) +
                  ", which has " + std::to_string(sequences_.tokens(index, g) - sequences_.committed(index, g)) +
                  " reserved");
}

// For the sequences in indices_: every reserved token that is not committed is new, unless the caller says how many.
BatchSizes Cache::write_batch(const i32* handles, i64 n, const i32* new_tokens, i64 g, i64 rows,
                              const BatchBuffers& out, BatchMarks& marks) const {
  const Growth growth = geometry_.groups[g].growth;
  const bool chosen = new_tokens && growth == Growth::token;
  const TableView view = table_->view(g);
  marks.begin(number_, g);
  try {
    BatchWriter writer(out, marks, geometry_.groups[g].block_tokens, geometry_.groups[g].row_tokens);
    const i64* indices = indices_.data();
    writer.add(n, [=](i64 i) {
      const i64 index = indices[i], done = sequences_.committed(index, g), have = sequences_.tokens(index, g);
      const i64 fresh = chosen ? new_tokens[i] : growth == Growth::fixed ? 0 : have - done;
      const i64 length = chosen ? done + fresh : have;
      if (fresh < 0 || length > have) refuse_step(handles[i], g, fresh);
      return BatchRow{handles[i], length, fresh, sequences_.front(index, g), view.at(index)};
    });
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
  check_rows(rows, out);
  prepare_padding(n, g, rows);
  return write_batch(handles, n, new_tokens, g, rows, out, marks);
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

// What each of the planned sequences has to commit. `num_tokens` ids are given, or -1 for none.
void Cache::plan_due(i64 n, i64 num_tokens) {
  const i64 g = token_group_;
  due_.resize(n);
  i64 all = 0;
  for (i64 i = 0; i < n; ++i) {
    const i64 due = sequences_.tokens(indices_[i], g) - sequences_.committed(indices_[i], g);
    due_[i] = static_cast<i32>(due);
    all += due;
  }
  if (num_tokens < 0 || num_tokens == all) return;
  throw SpecError("step: got " + std::to_string(num_tokens) + " token ids to commit, but " + std::to_string(all) +
                  " tokens are reserved and not committed");
}

// Whether the batch can take what the step makes of the planned sequences.
void Cache::check_fits(const i32* counts, i64 n, i64 rows, const BatchBuffers& out) const {
  check_rows(rows, out);
  const i64 g = token_group_, size = geometry_.groups[g].block_tokens;
  i64 blocks_most = 0, blocks_all = rows - n, fresh = rows - n;
  for (i64 i = 0; i < n; ++i) {
    const i64 blocks = ceil_div(sequences_.tokens(indices_[i], g) + counts[i], size);
    blocks_most = std::max(blocks_most, blocks);
    blocks_all += blocks;
    fresh += counts[i];
  }
  if (blocks_most <= out.max_blocks && blocks_all <= out.max_indices && fresh <= out.max_new_tokens) return;
  throw SpecError("step: needs up to " + std::to_string(blocks_most) + " blocks for a sequence, " +
                  std::to_string(blocks_all) + " in all and " + std::to_string(fresh) +
                  " new tokens; the batch was made for " + std::to_string(out.max_blocks) + ", " +
                  std::to_string(out.max_indices) + " and " + std::to_string(out.max_new_tokens));
}

// To commit needs no memory, so what could be refused comes first.
void Cache::advance_planned(const i32* handles, const i32* counts, i64 n, const i32* tokens, bool padded) {
  grow_planned(handles, counts, n, -1, padded);
  try {
    commit_planned(due_.data(), n, -1, tokens);
  } catch (...) {  // only a driver can fail here
    take_back_room(counts, n);
    throw;
  }
}

BatchSizes Cache::step(const i32* handles, const i32* counts, i64 n, const i32* tokens, i64 num_tokens, i64 rows,
                       const BatchBuffers& out, BatchMarks& marks) {
  Lock lock = enter();
  rows = std::max(rows, n);
  if (!counts) {
    if (static_cast<i64>(ones_.size()) < n) ones_.resize(n, 1);
    counts = ones_.data();
  }
  plan_extend(handles, counts, n, -1);
  plan_due(n, tokens ? num_tokens : -1);
  check_fits(counts, n, rows, out);
  advance_planned(handles, counts, n, tokens, rows > n && !table_->has_trash(token_group_));
  const BatchSizes sizes = write_batch(handles, n, nullptr, token_group_, rows, out, marks);
  leave();
  return sizes;
}

void Cache::advance(i64 handle, i64 count, const i32* tokens, i64 num_tokens) {
  Lock lock = enter();
  const i32 one = static_cast<i32>(handle), more = static_cast<i32>(count);
  plan_extend(&one, &more, 1, -1);
  plan_due(1, tokens ? num_tokens : -1);
  advance_planned(&one, &more, 1, tokens, false);
  leave();
}

}  // namespace kvmem
