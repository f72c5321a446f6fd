// The C++ baseline ("floor" in reports): the least that the bookkeeping of the workload can cost, with plain arrays of
// a fixed size and no errors, handles, threads, copy on write, windows or second backend. It does all of the visible
// work: blocks come from a free list, go into a table and carry reference counts; a step writes slots and what is new
// in the table, with --metadata every tensor that kernels read. With --cache full blocks are found by a chained 64-bit
// hash (without comparing the tokens, which a manager in use must do), and the least recently used is evicted first.

#include <algorithm>
#include <numeric>

#include "workload.h"

namespace kvmem_bench {
namespace {

using Ints = std::vector<i32>;
using Hashes = std::vector<std::uint64_t>;
constexpr i32 kNone = -1;

// Maps 64-bit keys to blocks, by open addressing; deletion shifts entries back.
class HashTable {
 public:
  explicit HashTable(i64 entries) {
    std::size_t slots = 2;
    while (static_cast<i64>(slots) < 2 * entries) slots *= 2;
    keys_.assign(slots, 0), blocks_.assign(slots, kNone), mask_ = slots - 1;
  }
  i32 find(std::uint64_t key) const {
    for (std::size_t at = key & mask_; blocks_[at] != kNone; at = (at + 1) & mask_) {
      if (keys_[at] == key) return blocks_[at];
    }
    return kNone;
  }
  void insert(std::uint64_t key, i32 block) {
    std::size_t at = key & mask_;
    while (blocks_[at] != kNone) at = (at + 1) & mask_;
    keys_[at] = key, blocks_[at] = block;
  }
  void erase(std::uint64_t key) {
    std::size_t at = key & mask_;
    while (keys_[at] != key || blocks_[at] == kNone) at = (at + 1) & mask_;
    for (std::size_t next = (at + 1) & mask_; blocks_[next] != kNone; next = (next + 1) & mask_) {
      if (((next - (keys_[next] & mask_)) & mask_) >= ((next - at) & mask_)) {
        keys_[at] = keys_[next], blocks_[at] = blocks_[next], at = next;
      }
    }
    blocks_[at] = kNone;
  }
  i64 bytes() const { return static_cast<i64>(keys_.size() * (sizeof(std::uint64_t) + sizeof(i32))); }

 private:
  Hashes keys_;
  Ints blocks_;
  std::size_t mask_;
};

std::uint64_t hash_block(std::uint64_t parent, const i32* tokens, i64 count) {
  std::uint64_t hash = parent + 0x9E3779B97F4A7C15u;
  for (i64 i = 0; i < count; ++i) {
    const auto product =
        static_cast<unsigned __int128>(hash ^ static_cast<std::uint64_t>(tokens[i])) * 0xD6E8FEB86659FD93u;
    hash = static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
  }
  return hash | 1;  // 0 means that a block is not cached
}

i64 shift_of(i64 block) {
  i64 shift = 0;
  while ((i64{1} << shift) < block) ++shift;
  if (i64{1} << shift != block) std::fprintf(stderr, "floor: --block must be a power of two\n"), std::exit(2);
  return shift;
}

class Floor {
 public:
  explicit Floor(const Workload& w) : w_(w) {
    std::iota(free_.rbegin(), free_.rend(), 0);
    if (!w.metadata) return;
    dense_.resize(w.sequences * width_), indices_.resize(w.sequences * width_), indptr_.resize(w.sequences + 1);
    for (auto* list : {&last_page_, &lengths_, &first_, &positions_, &rows_}) list->resize(w.sequences);
    cu_q_.resize(w.sequences + 1), cu_k_.resize(w.sequences + 1);
  }

  void admit(i64 i, const i32* prompt) {
    const i64 full = w_.prompt / w_.block;
    i32* row = &table_[i * width_];
    i64 found = 0;
    std::uint64_t parent = 0;
    if (w_.cache) {
      hashes_.resize(full);
      for (i64 b = 0; b < full; ++b) hashes_[b] = parent = hash_block(parent, prompt + b * w_.block, w_.block);
      const i64 most = (w_.prompt - 1) / w_.block;  // one token is left to compute
      for (i32 block; found < most && (block = index_.find(hashes_[found])) != kNone; ++found) {
        if (references_[block]++ == 0) unlink(block);
        row[found] = block;
      }
    }
    const i64 blocks = (w_.prompt + w_.block - 1) / w_.block;
    for (i64 b = found; b < blocks; ++b) row[b] = take();
    for (i64 b = found; w_.cache && b < full; ++b) publish(row[b], hashes_[b]);
    chain_[i] = parent;
    tokens_[i] = w_.prompt;
    std::copy(prompt + full * w_.block, prompt + w_.prompt, &tail_[i * w_.block]);
  }

  void step(const i32* last) {
    deltas_ = 0;
    const i64 mask = w_.block - 1;
    for (i64 i = 0; w_.cache && last && i < w_.sequences; ++i) {
      const i64 position = tokens_[i];
      i32* tail = &tail_[i << shift_];
      tail[(position - 1) & mask] = last[i];
      if ((position & mask) == 0) {
        chain_[i] = hash_block(chain_[i], tail, w_.block);
        publish(table_[i * width_ + (position >> shift_) - 1], chain_[i]);
      }
    }
    for (i64 i = 0; i < w_.sequences; ++i) {
      const i64 position = tokens_[i]++;
      if (last && (position & mask) != 0) {
        ++slots_[i];
        continue;
      }
      const i64 column = position >> shift_;
      i32& block = table_[i * width_ + column];
      if ((position & mask) == 0) {
        block = take();
        delta_row_[deltas_] = static_cast<i32>(i), delta_column_[deltas_] = static_cast<i32>(column);
        delta_block_[deltas_++] = block;
      }
      slots_[i] = (i64{block} << shift_) + (position & mask);
    }
    if (w_.metadata) fill();
    checksum_ += slots_[w_.sequences - 1];
  }

  void release(i64 i) {
    const i32* row = &table_[i * width_];
    // The last goes first, so that what others need stays longer.
    for (i64 b = (tokens_[i] + w_.block - 1) / w_.block - 1; b >= 0; --b) {
      const i32 block = row[b];
      if (--references_[block] > 0) continue;
      w_.cache&& hash_[block] != 0 ? link_newest(block) : free_.push_back(block);
    }
    tokens_[i] = 0;
  }

  void clear() {
    if (!w_.cache) return;
    for (i32 block; (block = newer_[w_.pool]) != w_.pool;) drop_oldest(), free_.push_back(block);
  }

  i64 blocks() const { return w_.pool - static_cast<i64>(free_.size()); }
  i64 checksum() const { return checksum_; }
  i64 metadata_bytes() const {
    const i64 each = static_cast<i64>(2 * sizeof(i32) + (w_.cache ? sizeof(std::uint64_t) + 2 * sizeof(i32) : 0));
    return w_.pool * each + (w_.cache ? index_.bytes() : 0) +
           static_cast<i64>(table_.size() * sizeof(i32) + tail_.size() * sizeof(i32)) + w_.sequences * 20;
  }

 private:
  i32 take() {
    i32 block;
    if (!free_.empty()) {
      block = free_.back();
      free_.pop_back();
    } else {
      block = w_.cache ? newer_[w_.pool] : static_cast<i32>(w_.pool);
      if (block == w_.pool) std::fprintf(stderr, "floor: the pool is too small\n"), std::exit(2);
      drop_oldest();
    }
    references_[block] = 1;
    return block;
  }
  void publish(i32 block, std::uint64_t hash) {
    if (index_.find(hash) != kNone) return;
    hash_[block] = hash;
    index_.insert(hash, block);
  }
  // A ring of all unreferenced cached blocks; its head is entry `pool`.
  void link_newest(i32 block) {
    const i32 head = static_cast<i32>(w_.pool), before = older_[head];
    older_[block] = before, newer_[block] = head, newer_[before] = block, older_[head] = block;
  }
  void unlink(i32 block) { newer_[older_[block]] = newer_[block], older_[newer_[block]] = older_[block]; }
  void drop_oldest() {
    const i32 block = newer_[w_.pool];
    unlink(block);
    index_.erase(hash_[block]);
    hash_[block] = 0;
  }
  void fill() {
    i32 all = 0, blocks = 0;
    for (i64 i = 0; i < w_.sequences; ++i) {
      const i64 length = tokens_[i], count = (length + w_.block - 1) >> shift_;
      const i32* row = &table_[i * width_];
      i32* dense = &dense_[i * width_];
      std::copy(row, row + count, dense);
      std::fill(dense + count, dense + width_, 0);
      std::copy(row, row + count, &indices_[blocks]);
      blocks += static_cast<i32>(count), all += static_cast<i32>(length);
      indptr_[i + 1] = blocks, cu_k_[i + 1] = all, cu_q_[i + 1] = static_cast<i32>(i + 1);
      lengths_[i] = static_cast<i32>(length), positions_[i] = static_cast<i32>(length - 1), first_[i] = 0;
      last_page_[i] = static_cast<i32>(((length - 1) & (w_.block - 1)) + 1), rows_[i] = static_cast<i32>(i);
    }
    checksum_ += indices_[blocks - 1] + dense_[0];
  }

  const Workload w_;
  const i64 width_ = w_.blocks_each(), shift_ = shift_of(w_.block);
  const i64 indexed_ = w_.cache ? w_.pool : 0, ring_ = w_.cache ? w_.pool + 1 : 0;
  Ints free_ = Ints(w_.pool), references_ = Ints(w_.pool);
  Hashes hash_ = Hashes(indexed_);
  Ints newer_ = Ints(ring_, static_cast<i32>(w_.pool)), older_ = newer_;
  HashTable index_{indexed_};
  Ints table_ = Ints(w_.sequences * width_), tail_ = Ints(w_.sequences * w_.block);
  std::vector<i64> tokens_ = std::vector<i64>(w_.sequences), slots_ = tokens_;
  Hashes chain_ = Hashes(w_.sequences), hashes_;
  Ints delta_row_ = Ints(w_.sequences), delta_column_ = delta_row_, delta_block_ = delta_row_;
  i64 deltas_ = 0, checksum_ = 0;
  Ints dense_, indices_, indptr_, last_page_, lengths_, first_, positions_, rows_, cu_q_, cu_k_;
};

}  // namespace
}  // namespace kvmem_bench

int main(int argc, char** argv) { return kvmem_bench::run<kvmem_bench::Floor>(argc, argv); }
