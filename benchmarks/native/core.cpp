// The workload on kvmem's core, without Python: `valgrind --tool=callgrind` counts its instructions, and a profiler
// sees the core alone. The metadata is that of a device without memory (device="meta") that holds Llama 3 8B: 128 KiB a
// token, pages of 2 MiB, so that a block of 16 tokens is a page.

#include "allocator/allocator.h"
#include "workload.h"

namespace kvmem_bench {
namespace {

using namespace kvmem;

constexpr i64 kTokenBytes = 128 << 10, kPageBytes = 2 << 20;

Geometry geometry_of(const Workload& w, bool paged) {
  const i64 longest = w.blocks_each() * w.block, cached_rows = w.cache && !paged ? 3 * w.sequences : 0;
  GroupGeometry group;
  group.block_tokens = w.block;
  group.max_tokens = longest;
  group.row_tokens = paged ? 0 : round_up(longest, 256);
  group.max_blocks = paged ? 2 + w.pool : (1 + w.sequences + cached_rows) * group.row_tokens / w.block;
  group.token_bytes = {kTokenBytes};
  const i64 row_slots = group.row_tokens * kTokenBytes / kPageBytes;
  group.row_slots = {row_slots};
  group.arena_slots = {paged ? ceil_div(group.max_blocks * w.block * kTokenBytes, kPageBytes)
                             : (1 + w.sequences + cached_rows) * row_slots + 1};
  Geometry geometry;
  geometry.page_bytes = kPageBytes;
  geometry.max_sequences = w.sequences;
  geometry.rows = 1 + w.sequences + cached_rows;
  geometry.groups = {group};
  return geometry;
}

class Core {
 public:
  explicit Core(const Workload& w)
      : w_(w),
        pages_(w.pool * w.block * kTokenBytes / kPageBytes),
        cache_(geometry_of(w, w.backend == "paged"), std::make_shared<PagePool>(kPageBytes, pages_, nullptr, false),
               w.backend == "paged", pages_, true, options_of(w)),
        handles_(w.sequences),
        ones_(w.sequences, 1),
        slots_(w.sequences) {
    buffers_.max_sequences = w.sequences;
    buffers_.max_new_tokens = w.sequences;
    buffers_.max_blocks = w.blocks_each();
    buffers_.max_indices = w.sequences * w.blocks_each();
    buffers_.slot_mapping = slots_.data();
    deltas_.resize(4 * w.sequences + 64), delta_blocks_.resize(deltas_.size());
    buffers_.max_deltas = static_cast<i64>(deltas_.size());
    buffers_.delta_places = deltas_.data(), buffers_.delta_blocks = delta_blocks_.data();
    marks_ = std::make_unique<BatchMarks>(buffers_);
    if (!w.metadata) return;
    const i64 n = w.sequences, table = n * w.blocks_each();
    words_.resize(2 * table + 9 * (n + 1));
    i32* next = words_.data();
    const auto take = [&](i64 count) { return next += count, next - count; };
    buffers_.block_table = take(table), buffers_.kv_indices = take(table);
    for (i32** field :
         {&buffers_.seq_lens, &buffers_.first_tokens, &buffers_.positions, &buffers_.batch_indices,
          &buffers_.cu_seqlens_q, &buffers_.cu_seqlens_k, &buffers_.kv_indptr, &buffers_.kv_last_page_len}) {
      *field = take(n + 1);
    }
  }

  void admit(i64 i, const i32* prompt) {
    i64 cached = 0;
    handles_[i] = static_cast<i32>(cache_.admit(prompt, w_.cache ? w_.prompt : 0, PrefixKey{}, &cached));
    const i32 rest = static_cast<i32>(w_.prompt - cached);
    cache_.extend(&handles_[i], &rest, 1, -1);
    cache_.commit(&handles_[i], &rest, 1, -1, w_.cache ? prompt + cached : nullptr);
  }

  void step(const i32* last) {
    const i32* tokens = w_.cache ? last : nullptr;
    GroupBuffers group{0, &buffers_, marks_.get(), {}};
    cache_.step(handles_.data(), ones_.data(), w_.sequences, tokens, tokens ? w_.sequences : 0, 0, &group, 1);
    checksum_ += slots_.back();
  }

  void release(i64 i) { cache_.free(&handles_[i], 1); }
  void clear() { cache_.clear_cache(); }
  i64 blocks() { return cache_.stats().cached_blocks; }
  i64 metadata_bytes() const { return 0; }
  i64 checksum() const { return checksum_; }

 private:
  static PrefixOptions options_of(const Workload& w) {
    PrefixOptions options;
    options.on = w.cache;
    options.policy = "density";
    return options;
  }

  const Workload w_;
  const i64 pages_;
  Allocator cache_;
  std::vector<i32> handles_, ones_;
  std::vector<i64> slots_, deltas_;
  std::vector<i32> delta_blocks_;
  std::unique_ptr<BatchMarks> marks_;
  std::vector<i32> words_;
  BatchBuffers buffers_;
  i64 checksum_ = 0;
};

}  // namespace
}  // namespace kvmem_bench

int main(int argc, char** argv) {
  try {
    return kvmem_bench::run<kvmem_bench::Core>(argc, argv);
  } catch (const kvmem::Error& error) {
    std::fprintf(stderr, "core: %s\n", error.what());
    return 2;
  }
}
