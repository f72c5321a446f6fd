#include "batch.h"

#include <algorithm>
#include <numeric>
#include <string>

namespace kvmem {

BatchWriter::BatchWriter(const BatchBuffers& out, BatchMarks& marks, i64 block_tokens, i64 row_tokens)
    : out_(out), marks_(marks), size_(block_tokens), row_tokens_(row_tokens), filled_before_(marks.filled) {
  for (i32* start : {out.cu_seqlens_q, out.cu_seqlens_k, out.kv_indptr, out.row_starts}) {
    if (start) start[0] = 0;
  }
  marks_.filled = 0;
  sizes_.table_from = out.max_sequences;
  sizes_.indices_from = -1;
}

void BatchWriter::refuse(i64 blocks, i64 fresh) const {
  throw SpecError("the step needs " + std::to_string(blocks) + " blocks for one sequence, " +
                  std::to_string(sizes_.indices + blocks) + " in all and " + std::to_string(sizes_.new_tokens + fresh) +
                  " new tokens; the batch was made for " + std::to_string(out_.max_blocks) + ", " +
                  std::to_string(out_.max_indices) + " and " + std::to_string(out_.max_new_tokens));
}

namespace {

// Entries [from, to) of the sequence's table.
void put_blocks(const Placement& at, i64 from, i64 to, i32* out) {
  if (at.blocks) {
    std::copy(at.blocks + from, at.blocks + to, out);
  } else {
    std::iota(out, out + (to - from), static_cast<i32>(at.first_block + from));
  }
}

}  // namespace

// Table entries [from, to) of the row become the sequence's blocks, or the read-trash block.
void BatchWriter::change(const BatchRow& row, i64 from, i64 to, bool zero) {
  if (to <= from) return;
  const i64 start = sizes_.rows * out_.max_blocks;
  if (out_.block_table) {
    i32* entries = out_.block_table + start + from;
    if (zero) {
      std::fill(entries, entries + (to - from), kReadTrash);
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
    std::fill(blocks, blocks + (to - from), kReadTrash);
  } else {
    put_blocks(row.at, from, to, blocks);
  }
  i64* places = out_.delta_places + sizes_.deltas;
  std::iota(places, places + (to - from), start + from);
  sizes_.deltas += to - from;
}

// Blocks that a window has dropped stand as the read-trash block, whatever the page table says of them.
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
}

void BatchWriter::write_indices(const BatchRow& row, i64 dropped, i64 blocks) {
  i32* to = out_.kv_indices + sizes_.indices;
  const i64 zeroes = std::min(dropped, blocks);
  std::fill(to, to + zeroes, kReadTrash);
  put_blocks(row.at, zeroes, blocks, to + zeroes);
  if (sizes_.indices_from < 0) sizes_.indices_from = sizes_.indices;
}

void BatchWriter::write_new_tokens(const BatchRow& row) {
  i64 to = sizes_.new_tokens;
  for (i64 position = row.length - row.fresh; position < row.length; ++position, ++to) {
    if (out_.slot_mapping) {
      const i64 ordinal = quotient(position, size_);
      const i64 block = row.at.blocks ? row.at.blocks[ordinal] : row.at.first_block + ordinal;
      out_.slot_mapping[to] = block * size_ + remainder(position, size_);
    }
    if (out_.positions) out_.positions[to] = static_cast<i32>(position);
    if (out_.batch_indices) out_.batch_indices[to] = static_cast<i32>(sizes_.rows);
  }
}

void BatchWriter::add(const BatchRow& row) {
  const i64 blocks = ceil_div(row.length, size_), dropped = quotient(row.first, size_);
  check_room(blocks, row.fresh);
  RowMark& mark = marks_.rows[sizes_.rows];
  const bool same =
      mark.handle == row.handle && mark.version == row.at.version && mark.dropped == dropped && mark.blocks == blocks;
  if (!same) write_table(row, dropped, blocks, mark);
  const bool stands = same && mark.index_at == sizes_.indices && sizes_.rows < filled_before_;
  if (out_.kv_indices && !stands) write_indices(row, dropped, blocks);
  mark.index_at = sizes_.indices;
  write_new_tokens(row);
  close_row(row.length, row.fresh, blocks, row.first, row.at.row);
}

void BatchWriter::pad() {
  check_room(1, 1);
  RowMark& mark = marks_.rows[sizes_.rows];
  change(BatchRow(), 0, mark.blocks, true);
  mark = RowMark();
  if (out_.kv_indices) {
    if (sizes_.indices_from < 0) sizes_.indices_from = sizes_.indices;
    out_.kv_indices[sizes_.indices] = kReadTrash;
  }
  if (out_.slot_mapping) out_.slot_mapping[sizes_.new_tokens] = kWriteTrash * size_;
  if (out_.positions) out_.positions[sizes_.new_tokens] = 0;
  if (out_.batch_indices) out_.batch_indices[sizes_.new_tokens] = static_cast<i32>(sizes_.rows);
  close_row(1, 1, 1, 0, 0);
}

void BatchWriter::close_row(i64 length, i64 fresh, i64 blocks, i64 first, i64 row) {
  const i64 i = sizes_.rows++;
  ++marks_.filled;
  sizes_.new_tokens += fresh;
  sizes_.indices += blocks;
  all_tokens_ += length;
  sizes_.max_new_tokens = std::max(sizes_.max_new_tokens, fresh);
  sizes_.max_tokens = std::max(sizes_.max_tokens, length);
  if (out_.seq_lens) out_.seq_lens[i] = static_cast<i32>(length);
  if (out_.first_tokens) out_.first_tokens[i] = static_cast<i32>(first);
  if (out_.cu_seqlens_q) out_.cu_seqlens_q[i + 1] = static_cast<i32>(sizes_.new_tokens);
  if (out_.cu_seqlens_k) out_.cu_seqlens_k[i + 1] = static_cast<i32>(all_tokens_);
  if (out_.kv_indptr) out_.kv_indptr[i + 1] = static_cast<i32>(sizes_.indices);
  if (out_.kv_last_page_len) {
    out_.kv_last_page_len[i] = length == 0 ? 0 : static_cast<i32>(remainder(length - 1, size_) + 1);
  }
  if (out_.rows) out_.rows[i] = static_cast<i32>(row);
  if (out_.row_starts) out_.row_starts[i] = out_.row_starts[i + 1] = static_cast<i32>(row * row_tokens_);
}

BatchSizes BatchWriter::finish() {
  if (sizes_.indices_from < 0) sizes_.indices_from = sizes_.indices;
  sizes_.table_from = std::min(sizes_.table_from, sizes_.table_end);
  return sizes_;
}

}  // namespace kvmem
