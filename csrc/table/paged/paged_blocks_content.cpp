// The content of blocks: which node each has (ops `hold`, `evict` and `shift`).

#include "table/paged/paged_blocks.h"

namespace kvmem {

void PagedBlocks::on_copy(const Op& op, bool undo) {
  const i32 node = static_cast<i32>(op.a);
  if (op.kind == OpKind::shift) return shift(op.b, node, op.d, op.c);
  if (op.kind == OpKind::hold) return attach(op.b, node, static_cast<i32>(op.c), op.d, undo);
  detach(op.b, node, static_cast<i32>(op.c), op.d, undo);
}

void PagedBlocks::attach(i64 g, i32 node, i32 block, i64 part, bool undo) {
  Blocks& b = blocks_[g];
  KVMEM_ASSERT(b.backed[block] && b.info[block].node == kNoNode, "the block has memory and no known content");
  KVMEM_ASSERT(block_of(node, g, part) == 0, "the group does not have this part yet");
  if (!undo) index_.expect_copies();
  const i64 at = node * stride_ + b.first_part + part;
  if (at >= static_cast<i64>(block_of_.size())) block_of_.resize(index_.capacity() * stride_);
  if (b.info[block].refs == 0) {
    b.ready.remove(block);
    enter_cached(b, block);
  }
  if (part == 0) index_.add_copy(node, g, undo);
  if (b.window >= 0) {
    if (b.info[block].refs > 0) index_.need(node, b.window);
    if (part == 0) index_.add_window_copy(node, b.window, undo);
  }
  b.info[block].node = node;
  block_of_[at] = block;
}

void PagedBlocks::detach(i64 g, i32 node, i32 block, i64 part, bool undo) {
  Blocks& b = blocks_[g];
  KVMEM_ASSERT(b.info[block].node == node && block_of(node, g, part) == block, "the block has this part");
  if (!undo) index_.expect_change();
  if (b.info[block].refs == 0) {
    leave_cached(b, block);
    b.ready.add(block);
  }
  if (b.window >= 0) {
    if (part == 0) index_.drop_window_copy(node, b.window, undo);
    if (b.info[block].refs > 0) index_.unneed(node, b.window, undo);
  }
  if (part == 0) index_.drop_copy(node, g, undo);
  b.info[block].node = kNoNode;
  block_of_[node * stride_ + b.first_part + part] = 0;
}

// Moves a node's content to another block. The block also replaces the old one in the list of snapshots, so that the
// order of eviction stays. Table entries change by ops of their own, before or after.
void PagedBlocks::shift(i64 g, i32 node, i64 from, i64 to) {
  Blocks& b = blocks_[g];
  KVMEM_ASSERT(b.info[from].node == node && b.info[to].node == kNoNode, "the content moves to a block without any");
  const bool was = b.info[from].refs > 0, is = b.info[to].refs > 0;
  if (b.window >= 0 && is && !was) index_.need(node, b.window);
  if (b.snapshots.has(from)) b.snapshots.add_before(from, to);
  if (b.info[to].refs == 0) {
    b.ready.remove(to);
    enter_cached(b, to);
  }
  if (b.info[from].refs == 0) {
    leave_cached(b, from);
    b.ready.add(from);
  }
  b.info[from].node = kNoNode;
  b.info[to].node = node;
  i32* const here = &block_of_[node * stride_ + b.first_part];
  *std::find(here, here + b.parts, static_cast<i32>(from)) = static_cast<i32>(to);
  if (b.window >= 0 && was && !is) index_.unneed(node, b.window, false);
}

void PagedBlocks::defer_empty_pages(i64 group) {
  Blocks& b = blocks_[group];
  std::vector<i32> ready(b.ready.size());
  b.ready.copy(b.ready.size(), ready.data());
  for (i32 block : ready) {
    const auto on_empty_page = [&](const SlotClass& c) {
      for (i64 slot = first_slot(c, block); slot < end_slot(c, block); ++slot) {
        if (c.slots[slot].users + c.slots[slot].cached == 0) return true;
      }
      return false;
    };
    if (std::any_of(b.classes.begin(), b.classes.end(), on_empty_page)) b.ready.put_off(block);
  }
}

}  // namespace kvmem
