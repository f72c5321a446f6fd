// Attention on the CPU over K and V where they lie: blocks of either backend, or slots of host memory. Each byte of K
// and V is read once for all query heads and new tokens of a block of queries, in the order of memory. The softmax is
// computed tile by tile (Milakov and Gimelshein, arXiv:1805.02867), and parts of a long sequence are merged by their
// log of the sum of exponentials (Flash-Decoding, Dao et al., 2023).
//
// Results depend on the problem and on the vector unit, not on the number of threads.
// Thread safety: an Attention is read only; calls of several threads run one after the other.
#pragma once

#include <string>
#include <vector>

#include "base/types.h"

namespace kvmem {

enum class Element { f32, bf16, f16, e4m3, e5m2, i8 };
i64 bytes_of(Element element);

// K or V of one layer: token t of block b, head h, begins at data + b * block + t * token + h * head, all in bytes. The
// elements of a head are dense.
struct KeyValues {
  const unsigned char* data;
  i64 block, token, head;
};

// Queries or outputs [tokens, query heads, width]; strides in bytes. element: f32, bf16 or f16.
struct Rows {
  unsigned char* data;
  i64 token, head;
};

// The sequences of a batch, as GroupBatch describes them.
struct AttentionBatch {
  const i32* block_table;   // [rows, table_blocks]
  const i32* seq_lens;      // [rows]
  const i32* first_tokens;  // [rows]: tokens before it are not held
  const i32* cu_seqlens_q;  // [rows + 1]
  i64 rows, table_blocks, block_size;
};

struct AttentionShape {
  i64 query_heads, heads, width, value_width;  // query_heads: a multiple of heads, those of K and V
  Element query, stored;                       // of q and out; of K and V
  float scale = 1, value_scale = 1;            // of scores; of outputs (a cache of 8 bits)
  float soft_cap = 0;                          // scores become cap * tanh(score / cap); 0 for none
  i64 window = 0;                              // tokens that a query sees, itself included; 0 for all
  bool causal = true;
  const float* sinks = nullptr;  // [query_heads]: a score beside those of the keys, without a value; null for none
};

// What a call reads and writes. lse: [tokens, query_heads], or null.
struct AttentionCall {
  Rows q, out;
  KeyValues k, v;
  i64 num_blocks;
  float* lse;
};

// Some query tokens of one sequence and some heads, over the tokens [begin, end) that they see, as `parts` tasks.
struct AttentionUnit {
  i64 query, queries, head, heads;  // query: the first, counted over the batch
  i64 position;                     // of the first query in its sequence
  i64 begin, end, parts;
  i64 first_block;    // entry of blocks() for the first token of the sequence
  i64 first_task;     // of the batch
  i64 first_partial;  // row of the partial results
};

// The work of a batch, divided once for all layers of a step. It copies what it is given, but not the sinks.
class Attention {
 public:
  // Throws SpecError for lengths below 0, for more new tokens than tokens, and where block_table is too short. Cost:
  // linear in the blocks.
  Attention(const AttentionBatch& batch, const AttentionShape& shape);

  // Computes out and lse on `threads` threads, the caller included. Throws, and writes nothing: SpecError where the
  // table has a block that is not one of call.num_blocks; OutOfMemory without room for partial results. Queries that
  // see no token give zeroes, and -inf.
  void run(const AttentionCall& call, i64 threads) const;

  const AttentionShape& shape() const { return shape_; }
  i64 queries() const { return queries_; }
  i64 block_size() const { return block_size_; }
  const std::vector<i32>& blocks() const { return blocks_; }
  i64 part_tokens() const { return part_tokens_; }

 private:
  void add_row(const AttentionBatch& batch, i64 row, i64 heads);
  void add_unit(AttentionUnit unit);
  i64 copy_blocks(const AttentionBatch& batch, i64 row, i64 first);

  const AttentionShape shape_;
  const i64 block_size_;
  i64 queries_ = 0, part_tokens_ = 0, partial_rows_ = 0;  // partial_rows: of units with more than one part
  i32 greatest_block_ = -1;
  std::vector<i32> blocks_;
  std::vector<AttentionUnit> units_;
  std::vector<i64> unit_of_task_;
};

// The vector units that the kernel is compiled for, and this machine has: "portable" always, "avx2", "avx512".
std::vector<const char*> attention_levels();
// Chooses one of them for all later calls; the default is the last of attention_levels(). Throws SpecError for others.
void use_attention_level(const std::string& name);

}  // namespace kvmem
