#include "base/journal.h"

#include <algorithm>

#include "base/id_list.h"
#include "base/ready_blocks.h"

namespace kvmem {

void Journal::grow(std::size_t more) { entries_.resize(std::max(size_ + more, 2 * entries_.size())); }

void Journal::restore(std::size_t size) {
  KVMEM_ASSERT(restoring_ && size <= size_, "entries are undone after the ops of the same transaction");
  while (size_ > size) {
    const Entry& e = entries_[--size_];
    switch (e.kind) {
      case Kind::byte:
        *static_cast<std::uint8_t*>(e.where) = static_cast<std::uint8_t>(e.at);
        break;
      case Kind::number:
        *static_cast<i64*>(e.where) = e.at;
        break;
      case Kind::element:
        (*static_cast<std::vector<i32>*>(e.where))[e.at] = e.old;
        break;
      case Kind::added:
        static_cast<IdList*>(e.where)->undo_add(e.at);
        break;
      case Kind::removed:
        static_cast<IdList*>(e.where)->undo_remove(e.at, e.old);
        break;
      case Kind::ready:
        static_cast<ReadyBlocks*>(e.where)->undo_move(e.at, e.old != 0);
        break;
    }
  }
}

}  // namespace kvmem
