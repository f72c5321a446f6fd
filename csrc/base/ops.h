// The records that join the deciding half to the acting half. Every change of state is one of these: a decision pushes
// it (which changes the bookkeeping), the space executes it (which changes memory), a replica applies it, and the log
// that take_ops() hands out is nothing else. Plain integers only, so a list of them can be sent anywhere.
#pragma once

#include "base/types.h"

namespace kvmem {

enum class OpKind : std::uint8_t {
  // What the acting half executes. An arena is one reserved address range; a slot is one page-sized piece of it.
  create,   // a = first page, b = count
  destroy,  // a = first page, b = count
  map,      // at = arena, a = first slot, b = first page, c = count: slot a+i shows page b+i
  unmap,    // at = arena, a = first slot, b = first page, c = count, d = number of the fence to wait for
  zero,     // at = arena, a = offset in bytes, b = bytes
  copy,     // at = arena, a = to offset, b = from offset, c = bytes
  fence,    // a = number: marks what the device has been given so far
  // What only the tables need.
  open,  // a = sequence handle
  // a = sequence handle; b, c = its tokens and committed tokens in group 0, where that is not recorded: 0 in every log
  close,
  bind,    // a = sequence handle, b = row
  unbind,  // a = sequence handle, b = row
  length,  // at = group, a = sequence handle, b = new number of tokens, c = old
  commit,  // at = group, a = sequence handle, b = new number of committed tokens, c = old
  front,   // at = group, a = sequence handle, b = new first token still held, c = old
  block,   // at = group, a = sequence handle, b = ordinal, c = new block, d = old block (0 is none)
  // What the content index of this allocator knows of memory. at = first arena. Stays within the deciding half.
  hold,  // a = node, b = group (paged) or row (virtual), c = block (paged) or 1 where the row has the fixed state too
  // The inverse. d: of the virtual backend, the row that held the node just before this one, 0 where it was the first;
  // of
  // the paged one, which part of those that the node takes in the group the block is. Virtual, c = (1 + w) <<
  // kWindowShift: only what the row shows of it for window number w; d is then of the rows that show it.
  evict,
  shift,  // a = node, b = group, c = new block, d = old block: what it holds has been copied there (paged)
  // Many `block` records in one, for an allocator that records nothing. at = first arena. Paged.
  show,  // a = place of the sequence, b = first ordinal, c = count, d = group: what these entries say counts from now
         // on
  hide,  // the inverse: it counts no more, and the entries are 0 once the transaction has ended
  // The eviction order passes over an item, and names it again. at = first arena.
  aside,  // a = node, b = its window or -1
  back,   // the inverse
  // The call uses nodes of the index from here on, which must not be given up for room. Its inverse is itself.
  use,  // a = the first of them in the list of what the call uses
};
constexpr int kOpKinds = 15;  // without the private ones

struct Op {
  OpKind kind;
  i32 at = 0;
  i64 a = 0, b = 0, c = 0, d = 0;
};

constexpr bool is_physical(OpKind kind) { return kind <= OpKind::fence; }
constexpr bool has_arena(OpKind kind) {
  return kind == OpKind::map || kind == OpKind::unmap || kind == OpKind::zero || kind == OpKind::copy;
}
constexpr bool is_private(OpKind kind) { return kind >= OpKind::hold; }

// The record that takes `op` back. open and close carry d = 1 then, so that handles and free lists return exactly.
inline Op inverse(Op op) {
  switch (op.kind) {
    case OpKind::create:
      op.kind = OpKind::destroy;
      break;
    case OpKind::destroy:
      op.kind = OpKind::create;
      break;
    case OpKind::map:
      op.kind = OpKind::unmap;
      break;
    case OpKind::unmap:
      op.kind = OpKind::map;
      break;
    case OpKind::fence:
      op.a -= 1;
      break;
    case OpKind::hold:
      op.kind = OpKind::evict;
      break;
    case OpKind::evict:
      op.kind = OpKind::hold;
      break;
    case OpKind::show:
      op.kind = OpKind::hide;
      break;
    case OpKind::hide:
      op.kind = OpKind::show;
      break;
    case OpKind::aside:
      op.kind = OpKind::back;
      break;
    case OpKind::back:
      op.kind = OpKind::aside;
      break;
    case OpKind::open:
      op.kind = OpKind::close, op.d = 1;
      break;
    case OpKind::close:
      op.kind = OpKind::open, op.d = 1;
      break;
    case OpKind::bind:
      op.kind = OpKind::unbind;
      break;
    case OpKind::unbind:
      op.kind = OpKind::bind;
      break;
    case OpKind::length:
    case OpKind::commit:
    case OpKind::front:
      std::swap(op.b, op.c);
      break;
    case OpKind::block:
    case OpKind::shift:
      std::swap(op.c, op.d);
      break;
    case OpKind::use:
    case OpKind::zero:
    case OpKind::copy:
      break;  // they write only to memory that nobody owns yet
  }
  return op;
}

}  // namespace kvmem
