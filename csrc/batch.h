// The metadata that attention kernels read, for one step and one group, in the caller's buffers. The buffers keep their
// addresses, so a captured graph that reads them stays valid; a step only rewrites their contents.
#pragma once

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

}  // namespace kvmem
