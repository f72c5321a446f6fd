// The records that join the deciding half to the acting half. Every change of state is one of these: a decision pushes
// it (which changes the metadata), the space executes it (which changes memory), a replica applies it, and the list
// that take_ops() returns is nothing else. Plain integers only, so a list of them can be sent anywhere.
//
// A new kind is one row of KVMEM_OPS, and its execution: in PagePool and Space if it is physical, in TableState if it
// is logical, in PageOwner if it is private. A change of what a public row means is a new kOpsVersion.
#pragma once

#include <array>
#include <string>

#include "base/types.h"

namespace kvmem {

// Counts the forms that a list of records has had.
constexpr i64 kOpsVersion = 2;

// ROW(kind, what it belongs to, the inverse kind, the numbers that the inverse exchanges, what the numbers say)
//
// physical  what the acting half executes. An arena is one reserved address range, a slot one page-sized piece of it
// logical   what only the tables need
// private   what the content index of one allocator knows of memory, and the order of eviction; never in a list.
//           at: the number of the page table (PageOwner::number)
#define KVMEM_OPS(ROW)                                                                                                 \
  ROW(create, physical, destroy, none, "a: first page, b: count. Physical pages come into being.")                     \
  ROW(destroy, physical, create, none, "a: first page, b: count. They go back to the system.")                         \
  ROW(map, physical, unmap, none, "at: arena; a: first slot, b: first page, c: count. Slot a+i shows page b+i.")       \
  ROW(unmap, physical, map, none,                                                                                      \
      "at: arena; a: first slot, b: first page, c: count, d: number of the fence to wait for.")                        \
  ROW(zero, physical, zero, none, "at: arena; a: offset in bytes, b: bytes.")                                          \
  ROW(copy, physical, copy, none, "at: arena; a: offset to copy to, b: offset to copy from, c: bytes.")                \
  ROW(load, physical, load, none, "at: arena; a: offset to copy to, b: offset in the host slots, c: bytes.")           \
  ROW(store, physical, store, none, "at: arena; a: offset to copy from, b: offset in the host slots, c: bytes.")       \
  ROW(fence, physical, fence, number, "a: number. Marks what the device has been given so far.")                       \
  ROW(version, logical, version, none, "a: number. The form of the list that it leads.")                               \
  ROW(open, logical, close, none, "a: sequence handle.")                                                               \
  ROW(close, logical, open, none,                                                                                      \
      "a: sequence handle; b: its tokens, c: its committed tokens in group 0. It has none in the others any more.")    \
  ROW(bind, logical, unbind, none, "a: sequence handle, b: row. Virtual backend.")                                     \
  ROW(unbind, logical, bind, none, "a: sequence handle, b: row. Virtual backend.")                                     \
  ROW(length, logical, length, b_and_c, "at: group; a: sequence handle, b: tokens, c: tokens before.")                 \
  ROW(commit, logical, commit, b_and_c,                                                                                \
      "at: group; a: sequence handle, b: committed tokens, c: committed tokens before.")                               \
  ROW(front, logical, front, b_and_c,                                                                                  \
      "at: group; a: sequence handle, b: first token that a window still holds, c: the one before.")                   \
  ROW(block, logical, block, c_and_d,                                                                                  \
      "at: group; a: sequence handle, b: index in its block table, c: block, d: block before; 0 is none. Paged "       \
      "backend.")                                                                                                      \
  ROW(acquire, logical, drop, none,                                                                                    \
      "at: group; a: sequence handle, b: first index, c: count, d: first block. Entry b+i, which was none, is block "  \
      "d+i. Paged backend.")                                                                                           \
  ROW(drop, logical, acquire, none,                                                                                    \
      "at: group; a: sequence handle, b: first index, c: count. These entries, blocks till now, are none. Paged "      \
      "backend.")                                                                                                      \
  ROW(hold, private_, evict, none,                                                                                     \
      "a: node, b: group (paged) or row (virtual), c: block, or 1 where the row has the fixed state too")              \
  /* Virtual, c = (1 + w) << kWindowShift: only what the row shows of it for window w; d is then of those rows. */     \
  ROW(evict, private_, hold, none,                                                                                     \
      "as hold; d: of the rows that hold the node the one just before this (virtual), or which part of the node's "    \
      "blocks in the group it is (paged)")                                                                             \
  ROW(shift, private_, shift, c_and_d, "a: node, b: group, c: new block, d: old block, whose bytes are copied there")  \
  /* The eviction order passes over an item, and names it again. */                                                    \
  ROW(aside, private_, back, none, "a: node, b: its window or -1")                                                     \
  ROW(back, private_, aside, none, "a: node, b: its window or -1")                                                     \
  ROW(keep, private_, keep, none, "a: node, b: group, c: the host slot that gets its bytes, d: the slot's generation") \
  /* The call uses nodes of the index from here on, which must not be evicted. */                                      \
  ROW(use, private_, use, none, "a: the first of them in the list of what the call uses")

enum class OpKind : std::uint8_t {
#define KVMEM_OP_NAME(name, role, inverse, exchanged, fields) name,
  KVMEM_OPS(KVMEM_OP_NAME)
#undef KVMEM_OP_NAME
};

enum class OpRole : std::uint8_t { physical, logical, private_ };
// Of a record that is taken back: which two of its numbers change places, or that it counts one less.
enum class OpExchange : std::uint8_t { none, b_and_c, c_and_d, number };

struct OpRow {
  const char* name;
  OpRole role;
  OpKind inverse;
  OpExchange exchange;
  const char* fields;
};

constexpr OpRow kOps[] = {
#define KVMEM_OP_ROW(name, role, inverse, exchanged, fields) \
  {#name, OpRole::role, OpKind::inverse, OpExchange::exchanged, fields},
    KVMEM_OPS(KVMEM_OP_ROW)
#undef KVMEM_OP_ROW
};

constexpr int op_kinds_until(OpRole role) {
  int count = 0;
  for (const OpRow& row : kOps) count += row.role <= role;
  return count;
}
constexpr int kPhysicalOps = op_kinds_until(OpRole::physical);
constexpr int kPublicOps = op_kinds_until(OpRole::logical);

// Predicates compare a kind with these two numbers, and what is taken back twice is as it was.
constexpr bool ops_are_sound() {
  for (std::size_t i = 1; i < std::size(kOps); ++i) {
    if (kOps[i].role < kOps[i - 1].role) return false;
  }
  for (const OpRow& row : kOps) {
    const OpRow& inverse = kOps[static_cast<int>(row.inverse)];
    if (inverse.role != row.role || inverse.exchange != row.exchange) return false;
    if (&kOps[static_cast<int>(inverse.inverse)] != &row) return false;
  }
  return true;
}
static_assert(ops_are_sound(), "rows stand by role, and an inverse belongs to the same half");

struct Op {
  OpKind kind;
  i32 at = 0;
  i64 a = 0, b = 0, c = 0, d = 0;
};

constexpr const OpRow& row_of(OpKind kind) { return kOps[static_cast<int>(kind)]; }
constexpr bool is_physical(OpKind kind) { return static_cast<int>(kind) < kPhysicalOps; }
constexpr bool is_private(OpKind kind) { return static_cast<int>(kind) >= kPublicOps; }
constexpr bool has_arena(OpKind kind) {
  return is_physical(kind) && kind != OpKind::create && kind != OpKind::destroy && kind != OpKind::fence;
}

// Returns the op that undoes `op`. zero, copy, load and store undo themselves: they write to memory that no sequence
// owns yet.
inline Op inverse(Op op) {
  const OpRow& row = row_of(op.kind);
  op.kind = row.inverse;
  if (row.exchange == OpExchange::b_and_c) std::swap(op.b, op.c);
  if (row.exchange == OpExchange::c_and_d) std::swap(op.c, op.d);
  if (row.exchange == OpExchange::number) op.a -= 1;
  return op;
}

// Of a `version` record: SpecError unless this module reads what follows it.
inline void check_version(const Op& op) {
  if (op.kind == OpKind::version && op.at == 0 && op.a == kOpsVersion && op.b == 0 && op.c == 0 && op.d == 0) return;
  throw SpecError("the ops are a list of version " + std::to_string(op.a) + ", and this kvmem reads version " +
                  std::to_string(kOpsVersion) +
                  ": run the same kvmem where they are decided and where they are followed");
}

}  // namespace kvmem
