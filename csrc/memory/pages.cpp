// The pool itself: its lock, its owners, and the state that ops change.

#include "memory/pages.h"

#include <algorithm>
#include <new>
#include <string>

#include "memory/transaction.h"

namespace kvmem {

PagePool::PagePool(i64 page_bytes, i64 budget_pages, std::shared_ptr<Driver> driver, bool create_ahead)
    : page_bytes_(page_bytes), create_ahead_(create_ahead), mapper_(std::make_unique<Mapper>()) {
  if (driver) {
    const i64 step = driver->info().granularity_bytes;
    if (page_bytes <= 0 || page_bytes % step != 0) {
      throw SpecError("page_bytes: got " + std::to_string(page_bytes) + "; device " + driver->info().name +
                      " maps multiples of " + std::to_string(step) + " bytes");
    }
    space_ = std::make_shared<Space>(std::move(driver), page_bytes);
  }
  budget_pages_ = budget_pages;
  grow_metadata(budget_pages);
  if (create_ahead_ && budget_pages_ > 0) {
    const Op op{OpKind::create, 0, 0, budget_pages_};
    if (space_) space_->execute(&op, &op + 1);
    apply(op, false);
  }
}

PagePool::~PagePool() {
  if (!forked()) return;
  // The mapper's thread and the threads that held locks do not exist in this process, so stopping or waiting would
  // block for ever. What they guard belongs to the parent.
  mapper_.release();
  mutex_.abandon();
  new (std::nothrow) std::shared_ptr<Space>(std::move(space_));
}

void PagePool::check_usable() const {
  fork_guard_.check("the page pool");
  if (is_poisoned()) space_->refuse_poisoned();
}

PoolLock PagePool::lock() {
  PoolLock held = lock_to_close();
  if (is_poisoned()) space_->refuse_poisoned();
  return held;
}

PoolLock PagePool::lock_to_close() {
  fork_guard_.check("the page pool");
  PoolLock held = PoolLock::wait_for(mutex_);
  if (mapper_->has_failed()) held.step_back(), settle();
  return held;
}

PoolLock PagePool::try_lock() {
  fork_guard_.check("the page pool");
  PoolLock held = PoolLock::try_for(mutex_);
  if (held && (mapper_->has_failed() || is_poisoned())) held.unlock();
  return held;
}

void PagePool::settle() {
  mapper_->wait_idle();
  if (!mapper_->has_failed()) return;
  if (recording) log.reserve(log.size() + mapper_->failed_ops());  // may throw, so it precedes every change
  ++disturbed_;
  mapper_->take_failed([this](const Op& failed) {
    const Op op = inverse(failed);
    apply(op, true);
    if (recording && op.kind != OpKind::zero) log.push_back(op);
  });
  KVMEM_ASSERT(mapped_pages_ >= 0 && mapped_pages_ <= present_pages_, "invariant 1 holds after the undo");
}

// ---- Owners --------------------------------------------------------------------------------------------------------

i32 PagePool::add_owner(PageOwner* owner, i64 arenas) {
  i64 first = 0, end = 0;
  for (; end - first < arenas; ++end) {
    if (is_arena(static_cast<i32>(end))) first = end + 1;
  }
  owners_.push_back(owner);
  owner->number = owners_seen_++;
  return static_cast<i32>(first);
}

void PagePool::drain() {
  if (space_) space_->drain();
}

void PagePool::drop_page(i32 page) {
  KVMEM_ASSERT(present(page) && refs_[page] > 0, "the page is mapped");
  if (--refs_[page] > 0) return;
  --mapped_pages_;
  free_.insert(page);
}

void PagePool::remove_owner(PageOwner* owner) {
  for (std::size_t i = 0; i < arenas_.size(); ++i) {
    if (arenas_[i].owner != owner) continue;
    if (space_) space_->remove_arena(static_cast<i32>(i));
    arenas_[i] = Arena();
  }
  const auto it = std::find(owners_.begin(), owners_.end(), owner);
  KVMEM_ASSERT(it != owners_.end(), "the owner is registered");
  owners_.erase(it);
}

void PagePool::add_arena(PageOwner* owner, i32 number, i64 slots) {
  KVMEM_ASSERT(number >= 0 && !is_arena(number) && slots >= 0, "the number of a new arena is unused");
  KVMEM_ASSERT(std::count(owners_.begin(), owners_.end(), owner) == 1, "the owner is registered");
  if (number >= static_cast<i32>(arenas_.size())) arenas_.resize(number + 1);
  if (space_) space_->add_arena(number, slots);
  arenas_[number] = {owner, slots};
}

void PagePool::set_host(PageOwner* owner, char* host, i64 bytes) {
  owner->host_bytes = bytes;
  for (std::size_t i = 0; space_ && i < arenas_.size(); ++i) {
    if (arenas_[i].owner == owner) space_->set_host(static_cast<i32>(i), host);
  }
}

void PagePool::grow_metadata(i64 pages) {
  if (pages <= known_pages()) return;
  free_.reserve(pages);
  content_.resize(pages, kUnknown);
  refs_.resize(pages, -1);  // last, because its size is what known_pages() returns: a retry after bad_alloc starts over
}

void PagePool::release_kept() {
  if (kept_.empty()) return;
  for (i64 page : kept_) {
    if (refs_[page] == 0) free_.insert(page);
  }
  kept_.clear();
}

// ---- State ---------------------------------------------------------------------------------------------------------

void PagePool::count_calls(const std::vector<Op>& ops) {
  OpKind kind = OpKind::zero;  // of the run of calls that the next op may continue
  i32 arena = -1;
  i64 next = -1;
  for (const Op& op : ops) {
    if (op.kind == OpKind::map || op.kind == OpKind::unmap) {
      const bool continues = op.kind == kind && op.at == arena && op.a == next;
      if (op.kind == OpKind::map) simulated_calls_.map += op.c;
      if (!continues) ++(op.kind == OpKind::map ? simulated_calls_.set_access : simulated_calls_.unmap);
      kind = op.kind, arena = op.at, next = op.a + op.c;
    } else if (is_physical(op.kind) && (op.kind != OpKind::zero || kind != OpKind::map)) {
      arena = -1;  // a zero does not end a run of maps, since it is executed after them
    }
  }
}

void PagePool::apply(const Op& op, bool undo) {
  switch (op.kind) {
    case OpKind::create:
      return apply_create(op, undo);
    case OpKind::destroy:
      return apply_destroy(op, undo);
    case OpKind::map:
      return apply_map(op);
    case OpKind::unmap:
      return apply_unmap(op, undo);
    case OpKind::fence:
      if (!undo && op.a != fence_ + 1) {
        throw SpecError("fence: number " + std::to_string(op.a) + " does not follow " + std::to_string(fence_));
      }
      fence_ = op.a;
      return;
    default:
      break;
  }
  if (undo) return;  // only memory changes, and nothing refers to it
  if (op.kind == OpKind::zero) {
    check_bytes("zero", op.at, op.a, op.b);
  } else if (op.kind == OpKind::copy) {
    check_bytes("copy", op.at, op.a, op.c);
    check_bytes("copy", op.at, op.b, op.c);
    if (std::max(op.a, op.b) - std::min(op.a, op.b) < op.c) throw SpecError("copy: the ranges overlap");
  } else {
    check_move(op);
  }
}

void PagePool::apply_create(const Op& op, bool undo) {
  if (op.a < 0 || op.b <= 0 || op.b > budget_pages_ - present_pages_ || op.a > known_pages() - op.b) {
    throw SpecError("create: " + std::to_string(op.b) + " pages from " + std::to_string(op.a) + "; the budget is " +
                    std::to_string(budget_pages_) + ", of which " + std::to_string(present_pages_) + " exist");
  }
  for (i64 p = op.a; p < op.a + op.b; ++p) {
    if (refs_[p] >= 0) throw SpecError("create: page " + std::to_string(p) + " exists already");
  }
  for (i64 p = op.a; p < op.a + op.b; ++p) {
    refs_[p] = 0;
    if (!undo) content_[p] = space_ && space_->info().fresh_pages_are_zero ? kClean : kUnknown;
  }
  free_.insert(op.a, op.b);
  present_pages_ += op.b;
}

void PagePool::apply_destroy(const Op& op, bool undo) {
  if (op.a < 0 || op.b <= 0 || op.b > known_pages() - op.a) {
    throw SpecError("destroy: there are no " + std::to_string(op.b) + " pages from " + std::to_string(op.a));
  }
  for (i64 p = op.a; p < op.a + op.b; ++p) {
    if (refs_[p] != 0) throw SpecError("destroy: page " + std::to_string(p) + " is not free");
  }
  for (i64 p = op.a; p < op.a + op.b; ++p) {
    refs_[p] = -1;
    if (undo) content_[p] = kUnknown;
  }
  free_.erase(op.a, op.b);
  present_pages_ -= op.b;
  absent_hint_ = std::min(absent_hint_, op.a);
  KVMEM_ASSERT(present_pages_ >= mapped_pages_, "only free pages are destroyed");
}

void PagePool::apply_map(const Op& op) {
  check_slots("map", op);
  for (i64 p = op.b; p < op.b + op.c; ++p) {
    if (refs_[p] < 0) throw SpecError("map: page " + std::to_string(p) + " was never created");
  }
  PageOwner& owner = *arenas_[op.at].owner;
  owner.on_map(op);
  for (i64 p = op.b; p < op.b + op.c; ++p) {
    if (refs_[p]++ == 0) {
      free_.erase(p);
      ++mapped_pages_;
      ++owner.owned_pages;
    }
  }
  KVMEM_ASSERT(owner.owned_pages <= mapped_pages_ && mapped_pages_ <= present_pages_, "invariant 1");
}

void PagePool::apply_unmap(const Op& op, bool undo) {
  check_slots("unmap", op);
  PageOwner& owner = *arenas_[op.at].owner;
  owner.on_unmap(op);
  // Outside a transaction the mapper's ops are undone, and it may have begun to write to these pages.
  const bool unknown = undo && !journal.restoring();
  for (i64 p = op.b; p < op.b + op.c; ++p) {
    KVMEM_ASSERT(refs_[p] > 0, "on_unmap() refuses pages that its slots do not map");
    if (--refs_[p] != 0) continue;
    --mapped_pages_;
    --owner.owned_pages;
    if (!is_kept(p)) free_.insert(p);
    if (unknown) content_[p] = kUnknown;
  }
  KVMEM_ASSERT(owner.owned_pages >= 0 && mapped_pages_ >= owner.owned_pages, "invariant 1");
}

bool PagePool::invalidate_content(const std::vector<Op>& ops, const Space::Progress& progress) {
  KVMEM_ASSERT(progress.begun <= ops.size(), "progress is about these ops");
  bool recreated = false;  // the undo of a destroy creates other pages, and the memory may have had another user
  for (std::size_t i = 0; i < progress.begun; ++i) {
    if (ops[i].kind == OpKind::keep) owner_numbered(ops[i].at).on_kept_in_vain(ops[i]), ++disturbed_;
    if (ops[i].kind == OpKind::destroy) recreated = true, forget_content(ops[i].a, ops[i].b);
    if (ops[i].kind == OpKind::map && progress.wrote) forget_content(ops[i].b, ops[i].c);
    if (ops[i].kind == OpKind::unmap && progress.wrote) arenas_[ops[i].at].owner->on_rewritten(ops[i]);
  }
  if (!progress.wrote && !recreated) return false;
  ++disturbed_;
  for (const Op& op : ops) {
    if (op.kind != OpKind::evict) continue;
    PageOwner& owner = owner_numbered(op.at);
    if (owner.can_evict(op)) owner.on_content(op, false);
  }
  return true;
}

// Marks the content of the free ones among these pages as unknown.
void PagePool::forget_content(i64 first, i64 count) {
  for (i64 page = first; page < first + count; ++page) {
    if (refs_[page] == 0) content_[page] = kUnknown;
  }
}

// ---- Checks --------------------------------------------------------------------------------------------------------

void PagePool::check_move(const Op& op) const {
  const std::string name = row_of(op.kind).name;
  check_bytes(name.c_str(), op.at, op.a, op.c);
  const i64 host = arenas_[op.at].owner->host_bytes;
  if (op.b >= 0 && op.b <= host && op.c <= host - op.b) return;
  throw SpecError(name + ": no such bytes of host slots: " + std::to_string(op.c) + " from " + std::to_string(op.b) +
                  "; this allocator has " + std::to_string(host) +
                  ". Make it with the host= of the one that it follows");
}

void PagePool::check_slots(const char* kind, const Op& op) const {
  if (!is_arena(op.at) || op.a < 0 || op.c <= 0 || op.a > arenas_[op.at].slots || op.c > arenas_[op.at].slots - op.a) {
    throw SpecError(std::string(kind) + ": no such slots: arena " + std::to_string(op.at) + ", " +
                    std::to_string(op.c) + " from slot " + std::to_string(op.a));
  }
  if (op.b < 0 || op.c > known_pages() || op.b > known_pages() - op.c) {
    throw SpecError(std::string(kind) + ": no such pages: " + std::to_string(op.c) + " from " + std::to_string(op.b));
  }
}

void PagePool::check_bytes(const char* kind, i32 arena, i64 offset, i64 bytes) const {
  const i64 size = is_arena(arena) ? arenas_[arena].slots * page_bytes_ : 0;
  const bool inside = offset >= 0 && bytes > 0 && offset <= size && bytes <= size - offset;
  const i64 slot = offset / page_bytes_;
  if (!inside || !arenas_[arena].owner->is_mapped(arena, slot, ceil_div(offset + bytes, page_bytes_) - slot)) {
    throw SpecError(std::string(kind) + ": no such bytes, or they are not mapped: arena " + std::to_string(arena) +
                    ", " + std::to_string(bytes) + " from " + std::to_string(offset));
  }
}

void PagePool::digest(Hasher& hash) const {
  hash.add(budget_pages_, present_pages_, mapped_pages_, fence_);
  for (std::size_t page = 0; page < refs_.size(); ++page) {
    if (refs_[page] >= 0) hash.add(page, refs_[page], content_[page]);
  }
  for (const PageOwner* owner : owners_) {
    hash.add(owner->number, owner->owned_pages, owner->limit_pages);
    owner->digest(hash);
  }
}

void PagePool::check(std::vector<std::string>* out) const {
  i64 present = 0, mapped = 0;
  for (i64 page = 0; page < known_pages(); ++page) {
    present += refs_[page] >= 0;
    mapped += refs_[page] > 0;
    if (free_.has(page) != (refs_[page] == 0)) {
      out->push_back("page " + std::to_string(page) + " has " + std::to_string(refs_[page]) +
                     " mappings, but the set of free pages says otherwise");
    }
  }
  if (present != present_pages_ || mapped != mapped_pages_) {
    out->push_back("invariant 1: counted " + std::to_string(present) + " pages present and " + std::to_string(mapped) +
                   " mapped, but the pool says " + std::to_string(present_pages_) + " and " +
                   std::to_string(mapped_pages_));
  }
  if (present_pages_ > budget_pages_) {
    out->push_back("invariant 1: " + std::to_string(present_pages_) + " pages exist, over the budget of " +
                   std::to_string(budget_pages_));
  }
  i64 owned = 0;
  for (const PageOwner* owner : owners_) owned += owner->owned_pages;
  if (owned != mapped_pages_) {
    out->push_back("invariant 1: owners hold " + std::to_string(owned) + " pages, but " +
                   std::to_string(mapped_pages_) + " are mapped");
  }
}

}  // namespace kvmem
