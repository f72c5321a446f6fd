// The pool's decisions: which pages an owner gets, which owner loses pages, and how the budget grows and shrinks.

#include <algorithm>
#include <string>

#include "memory/pages.h"
#include "memory/transaction.h"

namespace kvmem {

// Returns the page after `near` if it is free, else the lowest free page, or -1 if none is free.
i64 PagePool::find_free(i64 near) const {
  if (free_.empty()) return -1;
  return near >= 0 && near + 1 < known_pages() && free_.has(near + 1) ? near + 1 : free_.first();
}

// Creates the lowest absent pages: `most` of them, or as many as lie together. Returns the first.
i64 PagePool::create_absent(i64 most, Transaction& tx) {
  while (absent_hint_ < known_pages() && refs_[absent_hint_] >= 0) ++absent_hint_;
  const i64 first = absent_hint_;
  i64 n = 0;
  while (n < most && first + n < known_pages() && refs_[first + n] < 0) ++n;
  KVMEM_ASSERT(n > 0, "a page is absent, since fewer are present than the budget allows");
  tx.push({OpKind::create, 0, first, n});
  return first;
}

void PagePool::map_slots(PageOwner& owner, i32 arena, i64 slot, i64 count, i64 near, Zero zero, Transaction& tx) {
  KVMEM_ASSERT(is_arena(arena) && arenas_[arena].owner == &owner, "the arena is the owner's");
  const i64 asked = count;
  while (count > 0) {
    const i64 allowed = owner.limit_pages - owner.owned_pages;
    if (allowed <= 0) {
      if (owner.reclaim(count, true, tx) == 0) refuse(owner, asked);
      continue;
    }
    i64 page = find_free(near);
    if (page < 0) {
      const i64 room = budget_pages_ - present_pages_;
      if (room <= 0) {
        if (reclaim(owner, count, true, tx) == 0) refuse(owner, asked);
        continue;
      }
      page = create_absent(std::min({count, room, allowed}), tx);
    }
    i64 n = 1;
    while (n < std::min(count, allowed) && page + n < known_pages() && free_.has(page + n)) ++n;
    tx.push({OpKind::map, arena, slot, page, n});
    push_zeroes(owner, arena, slot, page, n, zero, tx);
    slot += n;
    count -= n;
    near = page + n - 1;
  }
}

i64 PagePool::make_room(PageOwner& owner, i64 pages, bool content, Transaction& tx) {
  if (const i64 allowed = owner.limit_pages - owner.owned_pages; allowed < pages) {
    owner.reclaim(pages - allowed, content, tx);
  } else if (const i64 now = ready_pages(owner); now < pages) {
    reclaim(owner, pages - now, content, tx);
  }
  return ready_pages(owner);
}

i64 PagePool::reclaim(PageOwner& owner, i64 pages, bool content, Transaction& tx) {
  i64 freed = 0;
  for (const bool also_content : {false, true}) {
    if (also_content && !content) break;
    if (freed < pages) freed += owner.reclaim(pages - freed, also_content, tx);
    for (PageOwner* other : owners_) {
      if (freed < pages && other != &owner) freed += other->reclaim(pages - freed, also_content, tx);
    }
  }
  return freed;
}

// Pushes a zero op for each page whose content the policy `zero` does not allow here, and notes that the owner writes
// to the pages from now on.
void PagePool::push_zeroes(const PageOwner& owner, i32 arena, i64 slot, i64 page, i64 count, Zero zero,
                           Transaction& tx) {
  for (i64 i = 0; i < count; ++i) {
    const i32 content = content_[page + i];
    const bool dirty = content != kClean && (zero == Zero::always || (zero == Zero::fresh && content != owner.number));
    if (dirty) tx.push({OpKind::zero, arena, (slot + i) * page_bytes_, page_bytes_});
    journal.set(content_, page + i, owner.number);
  }
}

void PagePool::refuse(const PageOwner& owner, i64 asked) const {
  throw OutOfMemory(std::to_string(asked) + " more page(s) of " + std::to_string(page_bytes_) + " bytes are needed; " +
                    std::to_string(owner.owned_pages) + " of " + std::to_string(owner.limit_pages) +
                    " allowed pages are in use here, and " + std::to_string(room_pages()) + " of " +
                    std::to_string(budget_pages_) + " are left in the pool");
}

i64 PagePool::available_pages(const PageOwner& owner) const {
  i64 pages = room_pages();
  for (const PageOwner* other : owners_) pages += other->parked_pages();
  return std::min(pages, owner.limit_pages - owner.owned_pages + owner.parked_pages());
}

i64 PagePool::held_by_others(const PageOwner& owner) const {
  i64 pages = 0;
  for (const PageOwner* other : owners_) pages += other == &owner ? 0 : other->owned_pages - other->parked_pages();
  return pages;
}

namespace {

// The tables of a transaction of the pool itself, which changes no table.
class NoTables final : public TableState {
 public:
  void apply_table(const Op&, bool) override { throw SpecError("a pool has no sequences"); }
};

}  // namespace

void PagePool::set_budget(i64 pages) {
  KVMEM_ASSERT(pages >= 0, "a budget is not negative");
  NoTables none;
  Transaction tx(*this, none);
  i64 excess = mapped_pages_ - pages;
  if (excess > 0 && !owners_.empty()) excess -= reclaim(*owners_.front(), excess, true, tx);
  if (excess > 0) {
    throw OutOfMemory("asked for a budget of " + std::to_string(pages) + " pages of " + std::to_string(page_bytes_) +
                      " bytes, but live sequences and pins hold " + std::to_string(pages + excess) +
                      ", which is the smallest that would fit; free or preempt sequences first, or compact()");
  }
  if (present_pages_ > pages) give_back(present_pages_ - pages, tx);
  grow_metadata(pages);
  const i64 before = budget_pages_;
  budget_pages_ = std::max(before, pages);  // the ops below are checked against it
  try {
    for (i64 first = 0; create_ahead_ && present_pages_ < pages; ++first) {
      if (refs_[first] >= 0) continue;
      i64 n = 1;
      while (present_pages_ + n < pages && refs_[first + n] < 0) ++n;
      tx.push({OpKind::create, 0, first, n});
    }
    tx.commit();
  } catch (...) {
    budget_pages_ = before;
    throw;
  }
  budget_pages_ = pages;
  KVMEM_ASSERT(present_pages_ <= budget_pages_, "invariant 1");
}

// Commits piece(tx), which returns how many pages it has freed, in up to `pieces` transactions while more() is true.
template <class More, class Piece>
void PagePool::in_pieces(PoolLock& lock, i64 pieces, More more, Piece piece) {
  for (i64 freed = 1; pieces > 0 && freed > 0 && more(); --pieces) {
    NoTables none;
    Transaction tx(*this, none);
    freed = piece(tx);
    tx.commit();
    note_piece();
    let_others_in(lock);
  }
}

void PagePool::reclaim_in_pieces(PoolLock& lock, PageOwner& owner, const std::function<i64()>& excess) {
  const i64 step = owner.piece_pages, begun = excess();
  if (begun <= step || begun > owner.reclaimable_pages()) return;
  in_pieces(
      lock, begun / step, [&] { return excess() > step; },
      [&](Transaction& tx) { return owner.reclaim(step, true, tx); });
}

void PagePool::shrink_in_pieces(PoolLock& lock, i64 pages) {
  i64 sure = 0, step = 0;
  for (const PageOwner* owner : owners_) {
    sure += owner->reclaimable_pages();
    step = step == 0 ? owner->piece_pages : std::min(step, owner->piece_pages);
  }
  if (step == 0 || mapped_pages_ - pages > sure) return;  // set_budget() might refuse
  in_pieces(
      lock, (mapped_pages_ - pages) / step, [&] { return mapped_pages_ - pages > step; },
      [&](Transaction& tx) { return reclaim(*owners_.front(), step, true, tx); });
  if (mapped_pages_ > pages + step) return;
  in_pieces(
      lock, (present_pages_ - pages) / step, [&] { return free_pages() > step; },
      [&](Transaction& tx) { return give_back(step, tx); });
}

// The highest pages go first, so that those that remain lie together.
i64 PagePool::give_back(i64 pages, Transaction& tx) {
  i64 given = 0;
  for (i64 last = known_pages(); last > 0 && given < pages;) {
    if (refs_[last - 1] != 0) {
      --last;
      continue;
    }
    i64 first = last - 1;
    while (first > 0 && free_.has(first - 1) && last - first < pages - given) --first;
    tx.push({OpKind::destroy, 0, first, last - first});
    given += last - first;
    last = first;
  }
  KVMEM_ASSERT(given <= std::max(i64{0}, pages), "no more pages are destroyed than were asked for");
  return given;
}

}  // namespace kvmem
