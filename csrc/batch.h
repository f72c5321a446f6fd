// The metadata that attention kernels read, for one step and one group, in the caller's buffers. The buffers keep their
// addresses, so a captured graph that reads them stays valid; a step only rewrites their contents.
#pragma once

#include "geometry.h"
#include "types.h"

namespace kvmem {

// B = rows of the batch (sequences, then padding), T = new tokens of the step. Null pointers are skipped.
struct BatchBuffers {
  i64 max_sequences = 0, max_new_tokens = 0, max_blocks = 0, max_indices = 0;
  i32* block_table = nullptr;       // [max_sequences, max_blocks], entries past a sequence's last block are 0
  i32* seq_lens = nullptr;          // [B] tokens including this step's
  i32* first_tokens = nullptr;      // [B] first token still held (sliding windows)
  i64* slot_mapping = nullptr;      // [T] block * block_size + offset: where each new token is written
  i32* positions = nullptr;         // [T] position of each new token in its sequence
  i32* batch_indices = nullptr;     // [T] row of the batch it belongs to
  i32* cu_seqlens_q = nullptr;      // [B + 1] new tokens, running sum
  i32* cu_seqlens_k = nullptr;      // [B + 1] all tokens, running sum
  i32* kv_indptr = nullptr;         // [B + 1] blocks, running sum
  i32* kv_indices = nullptr;        // [kv_indptr[B]] block ids
  i32* kv_last_page_len = nullptr;  // [B] tokens in the last block, 1 .. block_size
  i32* rows = nullptr;              // [B] virtual: the row of each sequence
  i32* row_starts = nullptr;        // [B + 1] virtual: row * row_tokens; the closing entry repeats the last
};

struct BatchSizes {
  i64 new_tokens = 0, indices = 0, max_new_tokens = 0, max_tokens = 0, rows = 0;
};

// Where one sequence's entries of one group lie, for kernels.
struct Placement {
  const i32* blocks = nullptr;  // paged: the block table's row
  i64 first_block = 0;          // virtual: the row's first block; the others follow
  i64 row = -1;                 // virtual: the row, -1 where there are none
};

// What one row of a batch says: `fresh` new tokens at the end of `length`, of which those before `first` are dropped.
struct BatchRow {
  i64 length = 0, fresh = 0, first = 0;
  Placement at;
};

// Writes rows one after the other. SpecError when a buffer is too small for the next one.
class BatchWriter {
 public:
  BatchWriter(const BatchBuffers& out, i64 block_tokens, i64 row_tokens);
  void add(const BatchRow& row);
  void pad();  // a row that reads the read-trash block and writes the write-trash block
  const BatchSizes& sizes() const { return sizes_; }

 private:
  void check_room(i64 blocks, i64 fresh) const;
  void write_blocks(i32* to, const BatchRow& row, i64 blocks) const;
  void write_new_tokens(const BatchRow& row);
  void close_row(i64 length, i64 fresh, i64 blocks, i64 first, i64 row);

  const BatchBuffers& out_;
  const i64 size_, row_tokens_;
  i64 all_tokens_ = 0;
  BatchSizes sizes_;
};

}  // namespace kvmem
