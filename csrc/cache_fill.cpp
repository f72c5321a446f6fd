// What kernels are told of a step, and the step in one call.

#include <algorithm>
#include <numeric>

#include "cache.h"

namespace kvmem {

// How many rows there are, and that no sum of theirs passes an int32 where that is what it is written to.
void Cache::check_rows(i64 rows, i64 g, const BatchBuffers& out) const {
  if (rows > out.max_sequences) {
    throw SpecError("a batch of " + std::to_string(rows) + " rows does not fit buffers for " +
                    std::to_string(out.max_sequences));
  }
  const GroupGeometry& group = geometry_.groups[g];
  const i64 longest = std::min(out.max_blocks * group.block_tokens, group.max_tokens);
  if (out.cu_seqlens_k && std::min(rows * longest, out.max_indices * group.block_tokens) > INT32_MAX) {
    refuse_narrow("cu_seqlens_k", rows, longest);
  }
  if (out.row_starts && geometry_.rows * group.row_tokens > INT32_MAX) {
    refuse_narrow("row_starts", geometry_.rows, group.row_tokens);
  }
}

void Cache::refuse_narrow(const char* field, i64 rows, i64 tokens) const {
  throw SpecError(std::string(field) + ": " + std::to_string(rows) + " rows of " + std::to_string(tokens) +
                  " tokens pass an int32; give an int64 array, as Allocator.make_batch() does");
}

// A batch with padding rows reads the trash blocks.
void Cache::prepare_padding(i64 n, i64 g, i64 rows) {
  if (rows <= n || table_->has_trash(g)) return;
  settle();
  Transaction tx(*pool_, *this);
  table_->back_trash(g, tx);
  tx.commit();
}

// Tokens that were cut off, and nothing has grown over since, are no kernel's to load.
void Cache::zero_cuts(i64 n, i64 g) {
  if (geometry_.tail_guard_tokens == 0) return;
  const auto is_cut = [&](i64 index) { return table_->has_cut(index, g, sequences_.tokens(index, g)); };
  if (std::none_of(indices_.begin(), indices_.begin() + n, is_cut)) return;
  settle();
  Transaction tx(*pool_, *this);
  for (i64 i = 0; i < n; ++i) {
    if (is_cut(indices_[i])) table_->zero_cut(indices_[i], g, sequences_.tokens(indices_[i], g), tx);
  }
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
    const StepRows step{handles, indices_.data(), sequences_.lengths(g, 0), groups_, n, view};
    const bool may_advance = growth == Growth::token && !chosen;
    for (i64 i = 0; i < n; ++i) {
      if (may_advance && marks.knows(i, handles[i])) i = writer.advance(step);
      if (i == n) break;
      const Sequences::Lengths& now = step.at(i);
      const i64 fresh = chosen ? new_tokens[i] : growth == Growth::fixed ? 0 : now.tokens - now.committed;
      const i64 length = chosen ? now.committed + fresh : now.tokens;
      if (fresh < 0 || length > now.tokens) refuse_step(handles[i], g, fresh);
      writer.add({handles[i], length, fresh, now.front, view.at(indices_[i])});
    }
    for (i64 i = n; i < rows; ++i) writer.pad();
    BatchSizes sizes = writer.finish();
    sizes.changes = changes();
    return sizes;
  } catch (...) {
    marks.clear();
    throw;
  }
}

BatchSizes Cache::fill(const i32* handles, i64 n, const i32* new_tokens, i64 group, i64 rows, const BatchBuffers& out,
                       BatchMarks& marks) {
  Lock lock = enter_still();
  check_group(group);
  const i64 g = group < 0 ? token_group_ : group;
  rows = std::max(rows, n);
  indices_.resize(n);
  for (i64 i = 0; i < n; ++i) indices_[i] = sequences_.index(handles[i]);
  check_rows(rows, g, out);
  prepare_padding(n, g, rows);
  zero_cuts(n, g);
  return write_batch(handles, n, new_tokens, g, rows, out, marks);
}

i64 Cache::find_stale(i64 group, const BatchBuffers& filled, const BatchMarks& marks, BatchSizes* sizes) {
  Lock lock = enter_still();
  check_group(group);
  if (!filled.slot_mapping || !filled.seq_lens || !filled.cu_seqlens_q) return -1;
  for (i64 row = 0; row < marks.filled; ++row) {
    const i64 handle = marks.rows[row].handle;
    if (handle == RowMark::kNobody) continue;
    const i64 index = sequences_.place_of(handle);
    const bool lives = sequences_.live(index) && sequences_.handle_of(index) == handle;
    if (!lives || !lies_as(index, group, row, filled, marks)) return handle;
  }
  sizes->changes = changes();
  return -1;
}

// Whether the new tokens of a filled row are still there, and whether they and those before them lie where they did.
bool Cache::lies_as(i64 index, i64 g, i64 row, const BatchBuffers& filled, const BatchMarks& marks) const {
  const i64 first_slot = filled.cu_seqlens_q[row], fresh = filled.cu_seqlens_q[row + 1] - first_slot;
  const i64 end = filled.seq_lens[row], begin = end - fresh;
  if (end > sequences_.tokens(index, g) || (fresh > 0 && begin < sequences_.front(index, g))) return false;
  if (!geometry_.debug && table_->view(g).at(index).version == marks.rows[row].version) return true;
  const i64 size = geometry_.groups[g].block_tokens, token_bytes = geometry_.groups[g].token_bytes[0];
  for (i64 token = begin; token < end; token = (token / size + 1) * size) {  // in a block they follow each other
    const i64 slot = filled.slot_mapping[first_slot + token - begin];
    if (table_->offset_bytes(index, g, 0, token) != slot * token_bytes) return false;
  }
  if (!filled.block_table) return true;
  const i32* table = filled.block_table + row * filled.max_blocks;
  for (i64 block = ceil_div(sequences_.front(index, g), size); block * size < end; ++block) {
    if (table_->offset_bytes(index, g, 0, block * size) != table[block] * size * token_bytes) return false;
  }
  return true;
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

// `num_tokens` ids are given of what the planned sequences have to commit, or -1 for none.
void Cache::check_due(i64 num_tokens) const {
  if (num_tokens < 0 || num_tokens == planned_.due) return;
  throw SpecError("step: got " + std::to_string(num_tokens) + " token ids to commit, but " +
                  std::to_string(planned_.due) + " tokens are reserved and not committed");
}

// Whether the batch can take what the step makes of the planned sequences, and so many padding rows.
void Cache::check_fits(i64 padding, const BatchBuffers& out) const {
  const i64 blocks = planned_.blocks + padding, fresh = planned_.fresh + padding;
  if (planned_.blocks_most <= out.max_blocks && blocks <= out.max_indices && fresh <= out.max_new_tokens) return;
  throw SpecError("step: needs up to " + std::to_string(planned_.blocks_most) + " blocks for a sequence, " +
                  std::to_string(blocks) + " in all and " + std::to_string(fresh) +
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
  check_due(tokens ? num_tokens : -1);
  check_rows(rows, token_group_, out);
  check_fits(rows - n, out);
  advance_planned(handles, counts, n, tokens, rows > n && !table_->has_trash(token_group_));
  const BatchSizes sizes = write_batch(handles, n, nullptr, token_group_, rows, out, marks);
  leave();
  return sizes;
}

// `telling`: seen_ notes what this may replace in its tables.
void Cache::advance_one(i64 handle, i64 count, const i32* tokens, i64 num_tokens, bool telling) {
  const i32 one = to_int32(handle, "handle"), more = to_int32(count, "count");
  plan_extend(&one, &more, 1, -1);
  check_due(tokens ? num_tokens : -1);
  if (telling) see_all(due_.data(), true);
  advance_planned(&one, &more, 1, tokens, false);
}

void Cache::advance(i64 handle, i64 count, const i32* tokens, i64 num_tokens) {
  Lock lock = enter();
  advance_one(handle, count, tokens, num_tokens, false);
  leave();
}

}  // namespace kvmem
