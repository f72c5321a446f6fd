#include "allocator/fill.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <string>
#include <unordered_map>
#include <utility>

namespace kvmem {

i64 BatchFiller::next_number() {
  static std::atomic<i64> made{0};
  return ++made;
}

// ---- checks ----------------------------------------------------------------------------------------

void BatchFiller::check_rows(i64 rows, const BatchGroups& batch) const {
  for (const GroupBuffers& group : batch) {
    const BatchBuffers& out = *group.out;
    groups_.check(group.group < 0 ? groups_.count() : group.group);
    if (rows > out.max_sequences) {
      throw SpecError("a batch of " + std::to_string(rows) + " rows does not fit buffers for " +
                      std::to_string(out.max_sequences));
    }
    const GroupGeometry& sizes = groups_[group.group];
    const i64 longest = std::min(out.max_blocks * sizes.block_tokens, sizes.max_tokens);
    if (out.cu_seqlens_k && std::min(rows * longest, out.max_indices * sizes.block_tokens) > INT32_MAX) {
      refuse_narrow("cu_seqlens_k", rows, longest);
    }
    const i64 all_rows = groups_.geometry().rows;
    if (out.row_starts && all_rows * sizes.row_tokens > INT32_MAX) {
      refuse_narrow("row_starts", all_rows, sizes.row_tokens);
    }
  }
}

void BatchFiller::refuse_narrow(const char* field, i64 rows, i64 tokens) {
  throw SpecError(std::string(field) + ": " + std::to_string(rows) + " rows of " + std::to_string(tokens) +
                  " tokens pass an int32; give an int64 array, as Allocator.make_batch() does");
}

// Returns the blocks and new tokens of the rows after the step that the plan describes.
RowTotals BatchFiller::total(const StepPlan& plan, i64 g, const i32* new_tokens) const {
  const Growth growth = groups_[g].growth;
  const i32* const more = plan.more;
  RowTotals totals;
  for (i64 i = 0; i < plan.n; ++i) {
    const Sequences::Lengths& now = *sequences_.lengths(g, plan.indices[i]);
    i64 length = now.tokens, fresh = now.tokens - now.committed;
    if (growth == Growth::fixed) length = more ? 1 : length, fresh = 0;
    if (growth == Growth::token && more) length += more[i], fresh = more[i];
    if (growth == Growth::token && new_tokens) length = now.committed + new_tokens[i], fresh = new_tokens[i];
    totals.add_row(length, fresh, groups_[g].block_tokens);
  }
  return totals;
}

void BatchFiller::check_fits(const RowTotals& totals, i64 padding, const BatchBuffers& out) {
  const i64 blocks = totals.blocks + padding, fresh = totals.fresh + padding;
  const i64 most = std::max(totals.blocks_most, i64{padding > 0});
  if (most <= out.max_blocks && blocks <= out.max_indices && fresh <= out.max_new_tokens) return;
  throw SpecError("step: needs up to " + std::to_string(most) + " blocks for a sequence, " + std::to_string(blocks) +
                  " in all and " + std::to_string(fresh) + " new tokens; the batch was made for " +
                  std::to_string(out.max_blocks) + ", " + std::to_string(out.max_indices) + " and " +
                  std::to_string(out.max_new_tokens));
}

void BatchFiller::check_step(const StepPlan& plan, i64 rows, const BatchGroups& batch) const {
  check_rows(rows, batch);
  for (const GroupBuffers& group : batch) {
    const bool planned = group.group == groups_.token_group();
    check_fits(planned ? plan.totals : total(plan, group.group, nullptr), rows - plan.n, *group.out);
  }
}

void BatchFiller::check_fill(const StepPlan& plan, const i32* new_tokens, i64 rows, const BatchGroups& batch) const {
  for (const GroupBuffers& group : batch) {
    for (i64 i = 0; new_tokens && i < plan.n; ++i) {
      check_new_tokens(plan.handles[i], plan.indices[i], group.group, new_tokens[i]);
    }
    check_fits(total(plan, group.group, new_tokens), rows - plan.n, *group.out);
  }
}

void BatchFiller::check_new_tokens(i64 handle, i64 index, i64 g, i64 fresh) const {
  const Sequences::Lengths& now = *sequences_.lengths(g, index);
  const bool right = fresh >= 0 && fresh <= now.tokens - now.committed;
  if (groups_[g].growth == Growth::token && !right) refuse_step(handle, index, g, fresh);
}

void BatchFiller::refuse_step(i64 handle, i64 index, i64 g, i64 fresh) const {
  throw SpecError("a step of " + std::to_string(fresh) + " new tokens for sequence handle " + std::to_string(handle) +
                  ", which has " + std::to_string(sequences_.tokens(index, g) - sequences_.committed(index, g)) +
                  " reserved");
}

// ---- memory that kernels load ----------------------------------------------------------------------

bool BatchFiller::lacks_padding(const BatchGroups& batch) const {
  return std::any_of(batch.begin(), batch.end(), [&](const GroupBuffers& g) { return !table_.has_reserved(g.group); });
}

void BatchFiller::back_padding(const BatchGroups& batch, bool follows, Transaction& tx) const {
  if (follows) {  // the other allocator counts the page as free, and may use it for a sequence
    throw SpecError(
        "padding rows read blocks 0 and 1, which the allocator that this one follows has not made yet: pad a batch "
        "there once, with batch(..., pad_to=), and apply its ops");
  }
  for (const GroupBuffers& group : batch) {
    if (!table_.has_reserved(group.group)) table_.back_reserved(group.group, tx);
  }
}

bool BatchFiller::has_cuts(const StepPlan& plan, i64 g) const {
  if (groups_.geometry().tail_guard_tokens == 0) return false;
  return std::any_of(plan.indices.begin(), plan.indices.end(),
                     [&](i64 index) { return table_.has_truncated(index, g, sequences_.tokens(index, g)); });
}

void BatchFiller::zero_cuts(const StepPlan& plan, i64 g) const {
  Transaction tx(pool_, tables_);
  for (i64 index : plan.indices) {
    const i64 tokens = sequences_.tokens(index, g);
    if (table_.has_truncated(index, g, tokens)) table_.zero_truncated(index, g, tokens, tx);
  }
  tx.commit();
}

// ---- metadata --------------------------------------------------------------------------------------

void BatchFiller::write(const StepPlan& plan, const i32* new_tokens, i64 rows, const BatchGroups& batch,
                        i64 changes) const {
  for (GroupBuffers& group : batch) {
    write_group(plan, new_tokens, rows, group);
    group.sizes.changes = changes;
  }
}

// Writes one group. All tokens that are reserved and not committed are new, unless the caller says how many are.
void BatchFiller::write_group(const StepPlan& plan, const i32* new_tokens, i64 rows, GroupBuffers& group) const {
  const i64 g = group.group, n = plan.n;
  KVMEM_ASSERT(rows >= n && rows <= group.out->max_sequences, "check_rows() comes first");
  const Growth growth = groups_[g].growth;
  const bool chosen = new_tokens && growth == Growth::token;
  const TableView view = table_.view(g);
  const i32* const handles = plan.handles;
  BatchMarks& marks = *group.marks;
  marks.begin(number_, g);
  try {
    BatchWriter writer(*group.out, marks, groups_[g].block_tokens, groups_[g].row_tokens);
    const StepRows step{handles, plan.indices.data(), sequences_.lengths(g, 0), groups_.count(), n, view};
    const bool may_advance = growth == Growth::token && !chosen;
    for (i64 i = 0; i < n; ++i) {
      if (may_advance && marks.has(i, handles[i])) i = writer.advance(step);
      if (i == n) break;
      const i64 index = plan.indices[i];
      const Sequences::Lengths& now = step.at(i);
      const i64 fresh = chosen ? new_tokens[i] : growth == Growth::fixed ? 0 : now.tokens - now.committed;
      const i64 length = chosen ? now.committed + fresh : now.tokens;
      if (fresh < 0 || length > now.tokens) refuse_step(handles[i], index, g, fresh);
      writer.add({handles[i], length, fresh, now.front, view.at(index)});
    }
    for (i64 i = n; i < rows; ++i) writer.pad();
    group.sizes = writer.finish();
  } catch (...) {
    marks.clear();
    throw;
  }
}

i64 BatchFiller::find_stale(i64 group, const BatchBuffers& filled, const BatchMarks& marks) const {
  groups_.check(group);
  if (!filled.slot_mapping || !filled.seq_lens || !filled.cu_seqlens_q) return -1;
  for (i64 row = 0; row < marks.filled; ++row) {
    const i64 handle = marks.rows[row].handle;
    if (handle == RowMark::kNobody) continue;
    const i64 index = sequences_.place_of(handle);
    const bool lives = sequences_.live(index) && sequences_.handle_of(index) == handle;
    if (!lives || !is_current(index, group, row, filled, marks)) return handle;
  }
  return -1;
}

// Returns whether the sequence still has the new tokens of a filled row, and has them and those before them at the same
// addresses.
bool BatchFiller::is_current(i64 index, i64 g, i64 row, const BatchBuffers& filled, const BatchMarks& marks) const {
  const i64 first_slot = filled.cu_seqlens_q[row], fresh = filled.cu_seqlens_q[row + 1] - first_slot;
  const i64 end = filled.seq_lens[row], begin = end - fresh;
  if (end > sequences_.tokens(index, g) || (fresh > 0 && begin < sequences_.front(index, g))) return false;
  if (!groups_.geometry().debug && table_.view(g).at(index).version == marks.rows[row].version) return true;
  const i64 size = groups_[g].block_tokens, token_bytes = groups_[g].token_bytes[0];
  for (i64 token = begin; token < end; token = (token / size + 1) * size) {  // a block is contiguous
    const i64 slot = filled.slot_mapping[first_slot + token - begin];
    if (table_.offset_bytes(index, g, 0, token) != slot * token_bytes) return false;
  }
  if (!filled.block_table) return true;
  const i32* table = filled.block_table + row * filled.max_blocks;
  for (i64 block = ceil_div(sequences_.front(index, g), size); block * size < end; ++block) {
    if (table_.offset_bytes(index, g, 0, block * size) != table[block] * size * token_bytes) return false;
  }
  return true;
}

// ---- sequences that share memory ------------------------------------------------------------------

namespace {

// Arranges the positions of a batch by the blocks that their sequences share in one group.
class Arrangement {
 public:
  Arrangement(const PageTable& table, const Sequences& sequences, const std::vector<i64>& indices, i64 g,
              i64 block_tokens)
      : table_(table), sequences_(sequences), indices_(indices), g_(g), block_tokens_(block_tokens) {}

  // Appends `positions` (ascending) to the order. REQUIRES: they share their first `depth` blocks.
  void arrange(const std::vector<i64>& positions, i64 depth, i64** order) const {
    std::vector<std::vector<i64>> candidates;
    std::unordered_map<i64, std::size_t> found;  // by key of the next block
    for (i64 position : positions) {
      const i64 index = indices_[position];
      std::size_t to = candidates.size();
      if (sequences_.front(index, g_) == 0 && sequences_.committed(index, g_) / block_tokens_ > depth) {
        to = found.emplace(table_.block_key(index, g_, depth), to).first->second;
      }
      if (to == candidates.size()) candidates.emplace_back();
      candidates[to].push_back(position);
    }
    std::vector<Alike> alike;
    for (std::vector<i64>& some : candidates) split(std::move(some), depth, &alike);
    std::sort(alike.begin(), alike.end(),
              [](const Alike& x, const Alike& y) { return x.positions[0] < y.positions[0]; });
    for (const Alike& some : alike) {
      if (some.positions.size() < 3) {
        *order = std::copy(some.positions.begin(), some.positions.end(), *order);
      } else {
        arrange(some.positions, some.blocks, order);
      }
    }
  }

 private:
  struct Alike {  // sequences that share `blocks` blocks
    std::vector<i64> positions;
    i64 blocks;
  };

  // Splits `positions`, whose block after `depth` has the same key, by whether they share that block. Nearly always all
  // of them do.
  void split(std::vector<i64> positions, i64 depth, std::vector<Alike>* alike) const {
    std::vector<i64> rest;
    for (; !positions.empty(); positions.swap(rest), rest.clear()) {
      Alike some{{positions[0]}, INT64_MAX};
      for (std::size_t i = 1; i < positions.size(); ++i) {
        const i64 blocks = table_.common_blocks(indices_[positions[0]], indices_[positions[i]], g_, depth);
        (blocks > depth ? some.positions : rest).push_back(positions[i]);
        if (blocks > depth) some.blocks = std::min(some.blocks, blocks);
      }
      alike->push_back(std::move(some));
    }
  }

  const PageTable& table_;
  const Sequences& sequences_;
  const std::vector<i64>& indices_;
  const i64 g_, block_tokens_;
};

}  // namespace

void BatchFiller::find_common_blocks(const std::vector<i64>& indices, i64 g, i64* out) const {
  for (std::size_t i = 0; i + 1 < indices.size(); ++i) {
    out[i] = can_share(g) ? table_.common_blocks(indices[i], indices[i + 1], g, 0) : 0;
  }
}

void BatchFiller::find_cascade_order(const std::vector<i64>& indices, i64 g, i64* order) const {
  std::vector<i64> positions(indices.size());
  std::iota(positions.begin(), positions.end(), 0);
  if (can_share(g)) {
    Arrangement(table_, sequences_, indices, g, groups_[g].block_tokens).arrange(positions, 0, &order);
  } else {
    std::copy(positions.begin(), positions.end(), order);
  }
}

}  // namespace kvmem
