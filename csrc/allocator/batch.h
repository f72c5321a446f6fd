// The metadata that attention kernels read, for one step and one group, in the caller's buffers. The buffers do not
// move, so a captured graph that reads them stays valid; a fill rewrites only what has changed since the last one.
//
// State: BatchMarks describes what the last fill left in the buffers; a BatchWriter lives for one fill. Invariant: what
// a mark claims is true of the buffers, unless a fill has failed. Thread safety: none; the caller guards the buffers.
#pragma once

#include <algorithm>
#include <vector>

#include "base/check.h"
#include "base/geometry.h"
#include "base/types.h"
#include "table/sequences.h"
#include "table/view.h"

namespace kvmem {

// B: rows of the batch (sequences, then padding); T: new tokens of the step. Null pointers are skipped.
struct BatchBuffers {
  i64 max_sequences = 0, max_new_tokens = 0, max_blocks = 0, max_indices = 0, max_deltas = 0;
  i32* block_table = nullptr;       // [max_sequences, max_blocks], entries past a sequence's last block are 0
  i32* seq_lens = nullptr;          // [B] tokens including this step's
  i32* first_tokens = nullptr;      // [B] first token still held (sliding windows)
  i64* slot_mapping = nullptr;      // [T] block * block_size + offset of each new token
  i32* positions = nullptr;         // [T] position of each new token in its sequence
  i32* batch_indices = nullptr;     // [T] row of the batch it belongs to
  i32* cu_seqlens_q = nullptr;      // [B + 1] new tokens, running sum
  i32* cu_seqlens_k = nullptr;      // [B + 1] all tokens, running sum
  i64* wide_seqlens_k = nullptr;    // the same, if int32 may overflow
  i32* kv_indptr = nullptr;         // [B + 1] blocks, running sum
  i32* kv_indices = nullptr;        // [kv_indptr[B]] block ids
  i32* kv_last_page_len = nullptr;  // [B] tokens in the last block, 1 .. block_size
  i32* rows = nullptr;              // [B] virtual: the row of each sequence
  i32* row_starts = nullptr;        // [B + 1] virtual: row * row_tokens; the closing entry repeats the last
  i64* wide_starts = nullptr;       // the same, if int32 may overflow
  i64* delta_places = nullptr;      // [max_deltas] entries of the table that changed: row * max_blocks + column
  i32* delta_blocks = nullptr;      // [max_deltas] their new values
};

// What the last fill left in a row of the buffers.
struct RowMark {
  i64 handle = kNobody, version = 0;
  i64 first = 0;                      // the first token still held
  i64 dropped = 0, blocks = 0;        // table entries [dropped, blocks) are its blocks, all others are 0
  i64 index_at = -1;                  // the start of its part of kv_indices
  i64 last_slot = 0, last_token = 0;  // the first token of the last block: its slot, and its position
  static constexpr i64 kNobody = INT64_MIN;
};

struct BatchMarks {
  explicit BatchMarks(const BatchBuffers& out)
      : rows(out.max_sequences), lengths(out.max_sequences), fresh(out.max_sequences), max_blocks(out.max_blocks) {
    clear();
  }
  // Begins a fill by this filler and group. Marks of another filler or group are cleared, because handles and versions
  // are unique within one allocator only.
  void begin(i64 filler, i64 group) {
    if (filler_ != filler || group_ != group) clear();
    filler_ = filler, group_ = group;
  }
  // Returns whether the last fill left this sequence in this row.
  bool has(i64 row, i64 handle) const { return rows[row].handle == handle; }
  // Forgets the content of the buffers: the next fill writes everything.
  void clear() {
    for (RowMark& mark : rows) mark = RowMark(), mark.blocks = max_blocks;
    filled = 0, one_each = false;
  }

  std::vector<RowMark> rows;
  std::vector<i32> lengths, fresh;  // of the fill in progress, by row
  i64 max_blocks;
  i64 filled = 0;         // rows of the last fill; the parts of kv_indices after them are undefined
  bool one_each = false;  // each of them had one new token

 private:
  i64 filler_ = 0, group_ = -1;
};

struct BatchSizes {
  i64 new_tokens = 0, indices = 0, max_new_tokens = 0, max_tokens = 0, rows = 0;
  i64 deltas = 0;                     // entries of the table that changed; -1 if more than max_deltas
  i64 table_from = 0, table_end = 0;  // the rows of the table that changed
  i64 indices_from = 0;               // the first entry of kv_indices that changed
  i64 changes = 0;                    // Allocator::changes() at the fill, or when find_stale() last found nothing
};

// The sequences of a step: handles, indices, and the lengths of all indices, `stride` apart.
struct StepRows {
  const i32* handles;
  const i64* indices;
  const Sequences::Lengths* lengths;
  i64 stride, count;
  TableView view;
  const Sequences::Lengths& at(i64 row) const { return lengths[indices[row] * stride]; }
};

// One row of a batch: `length` tokens, of which the last `fresh` are new and those before `first` are dropped.
struct BatchRow {
  i64 handle = RowMark::kNobody, length = 0, fresh = 0, first = 0;
  Placement at;
};

// Writes rows one after the other, then what depends on all lengths (finish()). add() and pad() throw SpecError if a
// buffer is too small for the next row; the caller must clear the marks then.
class BatchWriter {
 public:
  BatchWriter(const BatchBuffers& out, BatchMarks& marks, i64 block_tokens, i64 row_tokens);
  // Writes the next rows as long as each has grown by one token since the last fill, and returns the row after them.
  // Such a row differs from the last fill in a slot, in at most one block, and in what finish() writes.
  i64 advance(const StepRows& rows);
  void add(const BatchRow& row);
  void pad();  // adds a row that reads the null block and writes the padding block
  BatchSizes finish();

 private:
  void check_room(i64 blocks, i64 fresh) const {
    const bool fits = blocks <= out_.max_blocks && sizes_.indices + blocks <= out_.max_indices &&
                      sizes_.new_tokens + fresh <= out_.max_new_tokens;
    if (!fits) refuse(blocks, fresh);
  }
  [[noreturn]] void refuse(i64 blocks, i64 fresh) const;
  // Returns whether the block count of a row moves the rows after it.
  bool has_indices() const { return out_.kv_indices || out_.kv_indptr; }
  // Returns the end of the rows that advance() may write: rows of the last fill for which the buffers have room.
  i64 advance_end(const StepRows& rows) const {
    return std::min({rows.count, filled_before_, sizes_.rows + out_.max_new_tokens - sizes_.new_tokens});
  }
  [[gnu::noinline]] void advance_in_block(const StepRows& rows);
  [[gnu::noinline]] void advance_moved(const StepRows& rows);
  void append(const Placement& at, RowMark& mark);
  void write_table(const BatchRow& row, i64 dropped, i64 blocks, RowMark& mark);
  void change(const BatchRow& row, i64 from, i64 to, bool zero);
  void write_indices(const Placement& at, RowMark& mark);
  void write_slot(const Placement& at, i64 position, i64 to) {
    if (!out_.slot_mapping) return;
    const i64 ordinal = quotient(position, size_);
    const i64 block = at.blocks ? at.blocks[ordinal] : at.first_block + ordinal;
    out_.slot_mapping[to] = block * size_ + remainder(position, size_);
  }
  void write_new_tokens(const BatchRow& row);
  void write_lengths(i64 rows, bool one_each);
  void write_counts(i64 rows, bool one_each);
  template <class T>
  void write_starts(i64 rows, T* starts) const;
  void close_row(i64 length, i64 fresh, i64 blocks, i64 first, i64 row) {
    KVMEM_ASSERT(0 <= fresh && fresh <= length && sizes_.rows < out_.max_sequences, "the row fits the buffers");
    const i64 i = sizes_.rows++;
    sizes_.new_tokens += fresh;
    sizes_.indices += blocks;
    marks_.lengths[i] = static_cast<i32>(length);
    marks_.fresh[i] = static_cast<i32>(fresh);
    if (out_.first_tokens) out_.first_tokens[i] = static_cast<i32>(first);
    if (out_.kv_indptr) out_.kv_indptr[i + 1] = static_cast<i32>(sizes_.indices);
    if (out_.rows) out_.rows[i] = static_cast<i32>(row);
  }

  const BatchBuffers& out_;
  BatchMarks& marks_;
  const i64 size_, row_tokens_, filled_before_;
  const bool one_each_before_;
  i64 advanced_ = 0;  // rows
  BatchSizes sizes_;
};

}  // namespace kvmem
