#include "allocator/batch.h"

#include <algorithm>
#include <numeric>
#include <string>

namespace kvmem {

BatchWriter::BatchWriter(const BatchBuffers& out, BatchMarks& marks, i64 block_tokens, i64 row_tokens)
    : out_(out),
      marks_(marks),
      size_(block_tokens),
      row_tokens_(row_tokens),
      filled_before_(marks.filled),
      one_each_before_(marks.one_each) {
  for (i32* start : {out.cu_seqlens_q, out.cu_seqlens_k, out.kv_indptr}) {
    if (start) start[0] = 0;
  }
  if (out.wide_seqlens_k) out.wide_seqlens_k[0] = 0;
  marks_.filled = 0, marks_.one_each = false;
  sizes_.table_from = out.max_sequences;
  sizes_.indices_from = -1;
}

void BatchWriter::refuse(i64 blocks, i64 fresh) const {
  throw SpecError("the step needs " + std::to_string(blocks) + " blocks for one sequence, " +
                  std::to_string(sizes_.indices + blocks) + " in all and " + std::to_string(sizes_.new_tokens + fresh) +
                  " new tokens; the batch was made for " + std::to_string(out_.max_blocks) + ", " +
                  std::to_string(out_.max_indices) + " and " + std::to_string(out_.max_new_tokens));
}

i64 BatchWriter::advance(const StepRows& rows) {
  for (i64 before = -1; before < sizes_.rows;) {
    before = sizes_.rows;
    advance_in_block(rows);
    advance_moved(rows);
  }
  return sizes_.rows;
}

// Writes rows of which only a slot, and what finish() writes, have changed. Most steps consist of this loop.
void BatchWriter::advance_in_block(const StepRows& in) {
  const StepRows rows = in;  // a local copy, which no store can change
  const RowMark* const marks = marks_.rows.data();
  i32* const tokens = marks_.lengths.data();
  const i64 size = size_, first = sizes_.rows, most = advance_end(rows);
  i64* const slots = out_.slot_mapping ? out_.slot_mapping + sizes_.new_tokens : nullptr;
  const bool in_sum = has_indices();
  i64 i = first, blocks = sizes_.indices;
  for (; i < most; ++i) {
    const RowMark& mark = marks[i];
    const Sequences::Lengths& now = rows.at(i);
    const i64 offset = now.tokens - 1 - mark.last_token;
    const bool advanced = mark.handle == rows.handles[i] && mark.version == rows.view.version(rows.indices[i]) &&
                          (mark.index_at == blocks || !in_sum) && mark.first == now.front &&
                          now.tokens - now.committed == 1 && offset >= 0 && offset < size;
    if (!advanced) break;
    blocks += mark.blocks;
    tokens[i] = static_cast<i32>(now.tokens);
    if (slots) slots[i - first] = mark.last_slot + offset;
  }
  if (!one_each_before_) std::fill(marks_.fresh.data() + first, marks_.fresh.data() + i, 1);
  advanced_ += i - first;
  sizes_.rows = i, sizes_.new_tokens += i - first, sizes_.indices = blocks;
}

// Writes rows that have one more block, or that earlier rows have moved in kv_indices.
void BatchWriter::advance_moved(const StepRows& rows) {
  for (const i64 most = advance_end(rows); sizes_.rows < most;) {
    const i64 i = sizes_.rows;
    RowMark& mark = marks_.rows[i];
    const Sequences::Lengths& now = rows.at(i);
    const Placement at = rows.view.at(rows.indices[i]);
    const i64 offset = now.tokens - 1 - mark.last_token, blocks = mark.blocks + (offset == size_);
    const bool follows = mark.handle == rows.handles[i] && mark.version == at.version && mark.first == now.front &&
                         now.tokens - now.committed == 1 && offset >= 0 && offset <= size_;
    const bool moves = offset == size_ || (mark.index_at != sizes_.indices && has_indices());
    if (!follows || !moves || blocks > out_.max_blocks || sizes_.indices + blocks > out_.max_indices) return;
    if (offset == size_) append(at, mark);
    write_indices(at, mark);
    if (out_.slot_mapping) out_.slot_mapping[sizes_.new_tokens] = mark.last_slot + now.tokens - 1 - mark.last_token;
    marks_.lengths[i] = static_cast<i32>(now.tokens), marks_.fresh[i] = 1;
    ++advanced_, ++sizes_.rows, ++sizes_.new_tokens, sizes_.indices += blocks;
  }
}

void BatchWriter::add(const BatchRow& row) {
  KVMEM_ASSERT(0 <= row.first && row.first <= row.length, "a window drops tokens of the sequence only");
  const i64 blocks = ceil_div(row.length, size_), dropped = quotient(row.first, size_);
  check_room(blocks, row.fresh);
  RowMark& mark = marks_.rows[sizes_.rows];
  const bool same =
      mark.handle == row.handle && mark.version == row.at.version && mark.dropped == dropped && mark.blocks == blocks;
  if (!same) write_table(row, dropped, blocks, mark);
  if (!same || mark.index_at != sizes_.indices || sizes_.rows >= filled_before_) write_indices(row.at, mark);
  mark.first = row.first;
  if (row.fresh == 1 && out_.slot_mapping) {
    out_.slot_mapping[sizes_.new_tokens] = mark.last_slot + row.length - 1 - mark.last_token;
  } else {
    write_new_tokens(row);
  }
  close_row(row.length, row.fresh, blocks, row.first, row.at.row);
}

namespace {

// Writes entries [from, to) of the sequence's table.
void put_blocks(const Placement& at, i64 from, i64 to, i32* out) {
  if (at.blocks) {
    std::copy(at.blocks + from, at.blocks + to, out);
  } else {
    std::iota(out, out + (to - from), static_cast<i32>(at.first_block + from));
  }
}

}  // namespace

// Sets table entries [from, to) of the row to the sequence's blocks or, with `zero`, to the null block, and notes them
// as changed.
void BatchWriter::change(const BatchRow& row, i64 from, i64 to, bool zero) {
  if (to <= from) return;
  const i64 start = sizes_.rows * out_.max_blocks;
  if (out_.block_table) {
    i32* entries = out_.block_table + start + from;
    if (zero) {
      std::fill(entries, entries + (to - from), kNullBlock);
    } else {
      put_blocks(row.at, from, to, entries);
    }
  }
  sizes_.table_from = std::min(sizes_.table_from, sizes_.rows);
  sizes_.table_end = sizes_.rows + 1;
  if (!out_.delta_places || sizes_.deltas < 0 || sizes_.deltas + (to - from) > out_.max_deltas) {
    sizes_.deltas = -1;
    return;
  }
  i32* blocks = out_.delta_blocks + sizes_.deltas;
  if (zero) {
    std::fill(blocks, blocks + (to - from), kNullBlock);
  } else {
    put_blocks(row.at, from, to, blocks);
  }
  i64* places = out_.delta_places + sizes_.deltas;
  std::iota(places, places + (to - from), start + from);
  sizes_.deltas += to - from;
}

// Does what write_table() does for a row with one more block, faster, because all rows of a step may have one.
void BatchWriter::append(const Placement& at, RowMark& mark) {
  KVMEM_ASSERT(mark.blocks < out_.max_blocks, "the row has room for one more block");
  const i64 row = sizes_.rows, ordinal = mark.blocks++, place = row * out_.max_blocks + ordinal;
  const i64 block = at.blocks ? at.blocks[ordinal] : at.first_block + ordinal;
  mark.last_token = ordinal * size_, mark.last_slot = block * size_;
  if (out_.block_table) out_.block_table[place] = static_cast<i32>(block);
  sizes_.table_from = std::min(sizes_.table_from, row);
  sizes_.table_end = row + 1;
  if (!out_.delta_places || sizes_.deltas < 0 || sizes_.deltas == out_.max_deltas) {
    sizes_.deltas = -1;
    return;
  }
  out_.delta_places[sizes_.deltas] = place;
  out_.delta_blocks[sizes_.deltas++] = static_cast<i32>(block);
}

// Updates the row of the table. Entries that are out of window are the null block, whatever the page table has there.
void BatchWriter::write_table(const BatchRow& row, i64 dropped, i64 blocks, RowMark& mark) {
  const bool same = mark.handle == row.handle && mark.version == row.at.version && mark.dropped <= dropped;
  const i64 old_dropped = same ? mark.dropped : 0, old_blocks = same ? mark.blocks : 0;
  change(row, old_dropped, std::min(dropped, blocks), true);
  change(row, std::max(old_blocks, dropped), blocks, false);
  change(row, blocks, mark.blocks, true);
  mark.handle = row.handle;
  mark.version = row.at.version;
  mark.dropped = dropped;
  mark.blocks = blocks;
  mark.last_token = (blocks - 1) * size_;
  if (blocks > 0)
    mark.last_slot = (row.at.blocks ? row.at.blocks[blocks - 1] : row.at.first_block + blocks - 1) * size_;
}

// Writes the row's part of kv_indices: the same blocks as in its row of the table.
void BatchWriter::write_indices(const Placement& at, RowMark& mark) {
  const i64 from = mark.index_at = sizes_.indices;
  if (out_.kv_indptr) out_.kv_indptr[sizes_.rows + 1] = static_cast<i32>(from + mark.blocks);
  if (!out_.kv_indices) return;
  const i64 zeroes = std::min(mark.dropped, mark.blocks);
  std::fill_n(out_.kv_indices + from, zeroes, kNullBlock);
  put_blocks(at, zeroes, mark.blocks, out_.kv_indices + from + zeroes);
  if (sizes_.indices_from < 0) sizes_.indices_from = from;
}

void BatchWriter::write_new_tokens(const BatchRow& row) {
  for (i64 i = 0; i < row.fresh; ++i) write_slot(row.at, row.length - row.fresh + i, sizes_.new_tokens + i);
}

void BatchWriter::pad() {
  check_room(1, 1);
  RowMark& mark = marks_.rows[sizes_.rows];
  change(BatchRow(), 0, mark.blocks, true);
  mark = RowMark();
  if (out_.kv_indices) {
    if (sizes_.indices_from < 0) sizes_.indices_from = sizes_.indices;
    out_.kv_indices[sizes_.indices] = kNullBlock;
  }
  if (out_.slot_mapping) out_.slot_mapping[sizes_.new_tokens] = kPaddingBlock * size_;
  close_row(1, 1, 1, 0, 0);
}

// Plain loops over arrays, most of which the compiler vectorises. Arrays that no row has changed are not written again.
BatchSizes BatchWriter::finish() {
  const i64 rows = sizes_.rows;
  const i32 *lengths = marks_.lengths.data(), *fresh = marks_.fresh.data();
  const bool same_counts = one_each_before_ && rows == filled_before_ && rows == advanced_;
  i32 longest = 0, most = same_counts ? 1 : 0;
  for (i64 i = 0; i < rows; ++i) longest = std::max(longest, lengths[i]);
  for (i64 i = 0; !same_counts && i < rows; ++i) most = std::max(most, fresh[i]);
  sizes_.max_tokens = longest, sizes_.max_new_tokens = most;
  const bool one_each = most <= 1 && sizes_.new_tokens == rows;
  write_lengths(rows, one_each);
  if (!same_counts) write_counts(rows, one_each);
  marks_.filled = rows, marks_.one_each = one_each && rows > 0;
  if (sizes_.indices_from < 0) sizes_.indices_from = sizes_.indices;
  sizes_.table_from = std::min(sizes_.table_from, sizes_.table_end);
  return sizes_;
}

// Writes what depends on the length of each row.
void BatchWriter::write_lengths(i64 rows, bool one_each) {
  const i32 *lengths = marks_.lengths.data(), *fresh = marks_.fresh.data();
  if (out_.seq_lens) std::copy(lengths, lengths + rows, out_.seq_lens);
  if (out_.cu_seqlens_k) std::partial_sum(lengths, lengths + rows, out_.cu_seqlens_k + 1);
  if (i64* sums = out_.wide_seqlens_k) {
    for (i64 i = 0; i < rows; ++i) sums[i + 1] = sums[i] + lengths[i];
  }
  if (i32* last = out_.kv_last_page_len) {
    const i32 size = static_cast<i32>(size_);
    if ((size & (size - 1)) == 0) {
      for (i64 i = 0; i < rows; ++i) last[i] = lengths[i] == 0 ? 0 : ((lengths[i] - 1) & (size - 1)) + 1;
    } else {
      for (i64 i = 0; i < rows; ++i) last[i] = lengths[i] == 0 ? 0 : (lengths[i] - 1) % size + 1;
    }
  }
  if (i32* to = out_.positions) {
    for (i64 i = 0; one_each && i < rows; ++i) to[i] = lengths[i] - 1;
    for (i64 i = 0; !one_each && i < rows; ++i) {
      std::iota(to, to + fresh[i], lengths[i] - fresh[i]), to += fresh[i];
    }
  }
}

// On the virtual backend a mark's version is the row of addresses; it is 0 for a sequence without one, and for padding.
template <class T>
void BatchWriter::write_starts(i64 rows, T* starts) const {
  for (i64 i = 0; i < rows; ++i) starts[i] = static_cast<T>(marks_.rows[i].version * row_tokens_);
  starts[rows] = rows > 0 ? starts[rows - 1] : 0;
}

// Writes what depends on the number of new tokens of each row, and on its address.
void BatchWriter::write_counts(i64 rows, bool one_each) {
  const i32* fresh = marks_.fresh.data();
  if (out_.cu_seqlens_q) std::partial_sum(fresh, fresh + rows, out_.cu_seqlens_q + 1);
  if (out_.row_starts) write_starts(rows, out_.row_starts);
  if (out_.wide_starts) write_starts(rows, out_.wide_starts);
  if (i32* to = out_.batch_indices) {
    if (one_each) std::iota(to, to + rows, 0);
    for (i64 i = 0; !one_each && i < rows; ++i) to = std::fill_n(to, fresh[i], static_cast<i32>(i));
  }
}

}  // namespace kvmem
