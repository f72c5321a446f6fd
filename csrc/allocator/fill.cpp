// What kernels are told of a step, and the step in one call.

#include <algorithm>
#include <numeric>

#include "allocator/allocator.h"
#include "allocator/lengths.h"

namespace kvmem {

// How many rows there are, and that no sum of theirs passes an int32 where that is what it is written to.
void Cache::check_rows(i64 rows, const GroupBuffers& group) const {
  const BatchBuffers& out = *group.out;
  if (group.group < 0) check_group(groups_);  // says so
  check_group(group.group);
  if (rows > out.max_sequences) {
    throw SpecError("a batch of " + std::to_string(rows) + " rows does not fit buffers for " +
                    std::to_string(out.max_sequences));
  }
  const GroupGeometry& sizes = geometry_.groups[group.group];
  const i64 longest = std::min(out.max_blocks * sizes.block_tokens, sizes.max_tokens);
  if (out.cu_seqlens_k && std::min(rows * longest, out.max_indices * sizes.block_tokens) > INT32_MAX) {
    refuse_narrow("cu_seqlens_k", rows, longest);
  }
  if (out.row_starts && geometry_.rows * sizes.row_tokens > INT32_MAX) {
    refuse_narrow("row_starts", geometry_.rows, sizes.row_tokens);
  }
}

void Cache::refuse_narrow(const char* field, i64 rows, i64 tokens) const {
  throw SpecError(std::string(field) + ": " + std::to_string(rows) + " rows of " + std::to_string(tokens) +
                  " tokens pass an int32; give an int64 array, as Allocator.make_batch() does");
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

// How many blocks and new tokens rows of a batch have, of the sequences in indices_ once each has `more[i]` tokens
// (null: none) more than now, and all before those are committed.
Cache::Planned Cache::plan_rows(i64 n, i64 g, const i32* more, const i32* new_tokens) const {
  const Growth growth = geometry_.groups[g].growth;
  Planned planned;
  for (i64 i = 0; i < n; ++i) {
    const Sequences::Lengths& now = *sequences_.lengths(g, indices_[i]);
    i64 length = now.tokens, fresh = now.tokens - now.committed;
    if (growth == Growth::fixed) length = more ? 1 : length, fresh = 0;
    if (growth == Growth::token && more) length += more[i], fresh = more[i];
    if (growth == Growth::token && new_tokens) length = now.committed + new_tokens[i], fresh = new_tokens[i];
    const i64 blocks = ceil_div(length, geometry_.groups[g].block_tokens);
    planned.fresh += fresh, planned.blocks += blocks, planned.blocks_most = std::max(planned.blocks_most, blocks);
  }
  return planned;
}

// Whether the batch can take that, and so many padding rows.
void Cache::check_fits(const Planned& planned, i64 padding, const BatchBuffers& out) const {
  const i64 blocks = planned.blocks + padding, fresh = planned.fresh + padding;
  const i64 most = std::max(planned.blocks_most, i64{padding > 0});
  if (most <= out.max_blocks && blocks <= out.max_indices && fresh <= out.max_new_tokens) return;
  throw SpecError("step: needs up to " + std::to_string(most) + " blocks for a sequence, " + std::to_string(blocks) +
                  " in all and " + std::to_string(fresh) + " new tokens; the batch was made for " +
                  std::to_string(out.max_blocks) + ", " + std::to_string(out.max_indices) + " and " +
                  std::to_string(out.max_new_tokens));
}

// Padding rows read the trash blocks.
bool Cache::needs_trash(const GroupBuffers* groups, i64 num_groups) const {
  return std::any_of(groups, groups + num_groups, [&](const GroupBuffers& g) { return !table_->has_trash(g.group); });
}

void Cache::back_trash(const GroupBuffers* groups, i64 num_groups, Transaction& tx) {
  if (follows()) {  // the one that it follows takes the page for free, and may give it to a sequence
    throw SpecError(
        "padding rows read blocks 0 and 1, which the allocator that this one follows has not made yet: pad a batch "
        "there once, with batch(..., pad_to=), and apply its ops");
  }
  for (i64 k = 0; k < num_groups; ++k) {
    if (!table_->has_trash(groups[k].group)) table_->back_trash(groups[k].group, tx);
  }
}

void Cache::write_batches(const i32* handles, i64 n, const i32* new_tokens, i64 rows, GroupBuffers* groups,
                          i64 num_groups) const {
  for (GroupBuffers* g = groups; g < groups + num_groups; ++g) {
    g->sizes = write_batch(handles, n, new_tokens, g->group, rows, *g->out, *g->marks);
  }
}

void Cache::fill(const i32* handles, i64 n, const i32* new_tokens, i64 rows, GroupBuffers* groups, i64 num_groups) {
  const Lock lock = enter_still();
  rows = std::max(rows, n);
  indices_.resize(n);
  for (i64 i = 0; i < n; ++i) indices_[i] = sequences_.index(handles[i]);
  for (i64 k = 0; k < num_groups; ++k) check_rows(rows, groups[k]);
  if (rows > n && needs_trash(groups, num_groups)) {
    for (i64 k = 0; k < num_groups; ++k) {  // what could be refused below, before anything is changed
      const i64 g = groups[k].group;
      for (i64 i = 0; new_tokens && i < n; ++i) check_new_tokens(handles[i], indices_[i], g, new_tokens[i]);
      check_fits(plan_rows(n, g, nullptr, new_tokens), rows - n, *groups[k].out);
    }
    settle();
    Transaction tx(*pool_, *this);
    back_trash(groups, num_groups, tx);
    tx.commit();
  }
  for (i64 k = 0; k < num_groups; ++k) zero_cuts(n, groups[k].group);
  write_batches(handles, n, new_tokens, rows, groups, num_groups);
}

BatchSizes Cache::fill(const i32* handles, i64 n, const i32* new_tokens, i64 group, i64 rows, const BatchBuffers& out,
                       BatchMarks& marks) {
  check_group(group);
  GroupBuffers one{group < 0 ? token_group_ : group, &out, &marks, {}};
  fill(handles, n, new_tokens, rows, &one, 1);
  return one.sizes;
}

void Cache::check_new_tokens(i64 handle, i64 index, i64 g, i64 fresh) const {
  const Sequences::Lengths& now = *sequences_.lengths(g, index);
  const bool right = fresh >= 0 && fresh <= now.tokens - now.committed;
  if (geometry_.groups[g].growth == Growth::token && !right) refuse_step(handle, g, fresh);
}

// `num_tokens` ids are given of what the planned sequences have to commit, or -1 for none.
void Cache::check_due(i64 num_tokens) const {
  if (num_tokens < 0 || num_tokens == planned_.due) return;
  throw SpecError("step: got " + std::to_string(num_tokens) + " token ids to commit, but " +
                  std::to_string(planned_.due) + " tokens are reserved and not committed");
}

// Room first, then windows move on: all of it in one transaction.
void Cache::advance_planned(const i32* handles, const i32* counts, i64 n, const i32* tokens, const GroupBuffers* padded,
                            i64 num_padded) {
  const i32* const known = known_of(tokens);
  find_moving(due_.data(), n, -1);
  const bool publishes = completes_any(due_.data(), n, known);
  std::size_t at = 0;
  try {
    Lengthened lengths(*this, handles, counts, n, -1);
    if (!needy_.empty() || num_padded > 0 || publishes || !moving_.empty()) {
      if (!needy_.empty() || num_padded > 0) settle();
      Transaction tx(*pool_, *this);
      back_trash(padded, num_padded, tx);
      grow(counts, -1, &at, tx);
      write_committed(due_.data(), n, -1, known, tx);
      tx.commit();
    }
    lengths.done();
  } catch (const OutOfMemory& e) {
    explain_planned(at, counts, -1, e);
  }
  finish_commit(due_.data(), n, -1, known);
  if (geometry_.map_ahead_tokens > 0) map_ahead(n, -1);
}

void Cache::step(const i32* handles, const i32* counts, i64 n, const i32* tokens, i64 num_tokens, i64 rows,
                 GroupBuffers* groups, i64 num_groups) {
  mutate([&] {
    rows = std::max(rows, n);
    if (!counts && static_cast<i64>(ones_.size()) < n) ones_.resize(n, 1);
    const i32* const more = counts ? counts : ones_.data();
    plan_extend(handles, more, n, -1);
    check_due(tokens ? num_tokens : -1);
    for (i64 k = 0; k < num_groups; ++k) {
      const i64 g = groups[k].group;
      check_rows(rows, groups[k]);
      check_fits(g == token_group_ ? planned_ : plan_rows(n, g, more, nullptr), rows - n, *groups[k].out);
    }
    const bool pads = rows > n && needs_trash(groups, num_groups);
    advance_planned(handles, more, n, tokens, groups, pads ? num_groups : 0);
    write_batches(handles, n, nullptr, rows, groups, num_groups);
  });
}

BatchSizes Cache::step(const i32* handles, const i32* counts, i64 n, const i32* tokens, i64 num_tokens, i64 rows,
                       const BatchBuffers& out, BatchMarks& marks) {
  GroupBuffers one{token_group_, &out, &marks, {}};
  step(handles, counts, n, tokens, num_tokens, rows, &one, 1);
  return one.sizes;
}

// `telling`: seen_ notes what this may replace in its tables.
void Cache::advance_one(i64 handle, i64 count, const i32* tokens, i64 num_tokens, TableWrites* telling) {
  const i32 one = to_int32(handle, "handle"), more = to_int32(count, "count");
  plan_extend(&one, &more, 1, -1);
  check_due(tokens ? num_tokens : -1);
  if (telling) {
    see_all(due_.data(), true);
    telling->reserve(most_written(&more));
  }
  advance_planned(&one, &more, 1, tokens, nullptr, 0);
}

void Cache::advance(i64 handle, i64 count, const i32* tokens, i64 num_tokens) {
  mutate([&] { advance_one(handle, count, tokens, num_tokens, nullptr); });
}

}  // namespace kvmem
