// Copies of nodes and parts in tiers below the device.

#include "index/prefix_index.h"

namespace kvmem {

void PrefixIndex::set_lower(Item x, Tier tier, bool stored) {
  KVMEM_ASSERT(tier != Tier::device, "the page table counts the copies on the device");
  KVMEM_ASSERT(has_copy(x, tier) != stored, "a tier has one copy of an item, or none");
  if (x.window < 0) {
    nodes_[x.node].lower = stored ? nodes_[x.node].lower | bit(tier) : nodes_[x.node].lower & ~bit(tier);
  } else {
    Part& p = part(x.node, x.window);
    p.lower = static_cast<std::uint8_t>(stored ? p.lower | bit(tier) : p.lower & ~bit(tier));
  }
}

void PrefixIndex::add_copy(Item x, Tier tier, bool undo) {
  Node& n = nodes_[x.node];
  KVMEM_ASSERT(x.window < 0 || has_copy({x.node, -1}, tier), "the node has a copy where its part gets one");
  KVMEM_ASSERT(undo || n.linked, "the node can be found");
  const bool first = x.window < 0 && n.copies == 0 && n.lower == 0;
  if (undo && first) {  // undoes the drop_copy() that made the node loose, and may have unlinked it
    KVMEM_ASSERT(!loose_.empty() && loose_.back() == x.node, "changes are undone newest first");
    loose_.pop_back();
    if (!n.linked) relink(x.node);
  }
  set_lower(x, tier, true);
}

void PrefixIndex::drop_copy(Item x, Tier tier, bool undo) {
  for (i32 w = 0; x.window < 0 && w < windows_; ++w)
    KVMEM_ASSERT(!has_copy({x.node, w}, tier), "parts lose their copy before their node does");
  set_lower(x, tier, false);
  Node& n = nodes_[x.node];
  if (undo || x.window >= 0 || n.copies > 0 || n.lower != 0) return;
  loose_.push_back(x.node);
  if (idle(n)) unlink(x.node);
}

}  // namespace kvmem
