#include "batch.h"

#include <algorithm>
#include <numeric>
#include <string>

namespace kvmem {

BatchWriter::BatchWriter(const BatchBuffers& out, i64 block_tokens, i64 row_tokens)
    : out_(out), size_(block_tokens), row_tokens_(row_tokens) {
  for (i32* start : {out.cu_seqlens_q, out.cu_seqlens_k, out.kv_indptr, out.row_starts}) {
    if (start) start[0] = 0;
  }
}

void BatchWriter::check_room(i64 blocks, i64 fresh) const {
  const i64 indices = sizes_.indices + blocks, tokens = sizes_.new_tokens + fresh;
  if (blocks <= out_.max_blocks && indices <= out_.max_indices && tokens <= out_.max_new_tokens) return;
  throw SpecError("the step needs " + std::to_string(blocks) + " blocks for one sequence, " + std::to_string(indices) +
                  " in all and " + std::to_string(tokens) + " new tokens; the batch was made for " +
                  std::to_string(out_.max_blocks) + ", " + std::to_string(out_.max_indices) + " and " +
                  std::to_string(out_.max_new_tokens));
}

// Blocks that a window has dropped stand as the read-trash block, whatever the page table says of them.
void BatchWriter::write_blocks(i32* to, const BatchRow& row, i64 blocks) const {
  const i64 dropped = std::min(blocks, row.first / size_);
  std::fill(to, to + dropped, kReadTrash);
  if (row.at.blocks) {
    std::copy(row.at.blocks + dropped, row.at.blocks + blocks, to + dropped);
  } else {
    std::iota(to + dropped, to + blocks, static_cast<i32>(row.at.first_block + dropped));
  }
}

void BatchWriter::write_new_tokens(const BatchRow& row) {
  i64 to = sizes_.new_tokens;
  for (i64 position = row.length - row.fresh; position < row.length; ++position, ++to) {
    if (out_.slot_mapping) {
      const i64 ordinal = position / size_;
      const i64 block = row.at.blocks ? row.at.blocks[ordinal] : row.at.first_block + ordinal;
      out_.slot_mapping[to] = block * size_ + position % size_;
    }
    if (out_.positions) out_.positions[to] = static_cast<i32>(position);
    if (out_.batch_indices) out_.batch_indices[to] = static_cast<i32>(sizes_.rows);
  }
}

void BatchWriter::add(const BatchRow& row) {
  const i64 blocks = ceil_div(row.length, size_);
  check_room(blocks, row.fresh);
  if (out_.block_table) {
    i32* entries = out_.block_table + sizes_.rows * out_.max_blocks;
    write_blocks(entries, row, blocks);
    std::fill(entries + blocks, entries + out_.max_blocks, kReadTrash);
  }
  if (out_.kv_indices) write_blocks(out_.kv_indices + sizes_.indices, row, blocks);
  write_new_tokens(row);
  close_row(row.length, row.fresh, blocks, row.first, row.at.row);
}

void BatchWriter::pad() {
  check_room(1, 1);
  if (out_.block_table) {
    i32* entries = out_.block_table + sizes_.rows * out_.max_blocks;
    std::fill(entries, entries + out_.max_blocks, kReadTrash);
  }
  if (out_.kv_indices) out_.kv_indices[sizes_.indices] = kReadTrash;
  if (out_.slot_mapping) out_.slot_mapping[sizes_.new_tokens] = kWriteTrash * size_;
  if (out_.positions) out_.positions[sizes_.new_tokens] = 0;
  if (out_.batch_indices) out_.batch_indices[sizes_.new_tokens] = static_cast<i32>(sizes_.rows);
  close_row(1, 1, 1, 0, 0);
}

void BatchWriter::close_row(i64 length, i64 fresh, i64 blocks, i64 first, i64 row) {
  const i64 i = sizes_.rows++;
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
  if (out_.kv_last_page_len) out_.kv_last_page_len[i] = length == 0 ? 0 : static_cast<i32>((length - 1) % size_ + 1);
  if (out_.rows) out_.rows[i] = static_cast<i32>(row);
  if (out_.row_starts) out_.row_starts[i] = out_.row_starts[i + 1] = static_cast<i32>(row * row_tokens_);
}

}  // namespace kvmem
