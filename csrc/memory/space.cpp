#include "memory/space.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

namespace kvmem {

Reservation::~Reservation() {
  try {
    driver_->release(base_, bytes_);
  } catch (...) {
    // A destructor has nobody to tell. The addresses stay reserved; no memory is lost with them.
  }
}

Space::Space(std::shared_ptr<Driver> driver, i64 page_bytes) : driver_(std::move(driver)), page_bytes_(page_bytes) {}

Space::~Space() {
  // Wait before unmapping, as always. A dead context makes every call here fail: the system has taken all back then.
  try {
    for (const Mark& mark : marks_) driver_->wait(mark.event);
  } catch (...) {
  }
  for (const Mark& mark : marks_) {
    try {
      driver_->forget(mark.event);
    } catch (...) {
    }
  }
  for (std::size_t arena = 0; arena < arenas_.size(); ++arena) remove_arena(static_cast<i32>(arena));
  for (PageHandle page : pages_) {
    if (page == 0) continue;
    try {
      driver_->destroy(page);
    } catch (...) {
    }
  }
}

void Space::add_arena(i32 number, i64 slots) {
  std::lock_guard<std::mutex> lock(mutex_);
  Arena arena;
  arena.reservation = std::make_unique<Reservation>(driver_, slots * page_bytes_, 0);
  arena.slots = SlotSet(slots);
  if (number >= static_cast<i32>(arenas_.size())) arenas_.resize(number + 1);
  arenas_[number] = std::move(arena);
}

void Space::remove_arena(i32 number) {
  std::lock_guard<std::mutex> lock(mutex_);
  Arena& arena = arenas_[number];
  if (!arena.reservation) return;
  for (i64 from = arena.slots.next(0), to; from < arena.slots.slots(); from = arena.slots.next(to)) {
    to = from;
    while (to < arena.slots.slots() && arena.slots.has(to)) ++to;
    if (!try_unmap(number, from, to - from)) {
      // One page may be what the driver cannot unmap; the others go.
      for (i64 slot = from; slot < to; ++slot) try_unmap(number, slot, 1);
    }
  }
  arena = Arena();
  const auto of_arena = [number](const Repair& r) { return r.arena == number; };  // another arena may get the number
  repairs_.erase(std::remove_if(repairs_.begin(), repairs_.end(), of_arena), repairs_.end());
}

Address Space::arena_base(i32 arena) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return arenas_[arena].reservation->base();
}

i64 Space::arena_bytes(i32 arena) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return arenas_[arena].reservation->bytes();
}

bool Space::try_unmap(i32 arena, i64 slot, i64 count) {
  try {
    driver_->unmap_run(at(arena, slot), page_bytes_, count);
    return true;
  } catch (...) {
    return false;  // for those that go on with the rest
  }
}

void Space::execute(const Op* first, const Op* last, bool ahead, Progress* progress) {
  std::lock_guard<std::mutex> lock(mutex_);
  wrote_ = false;
  fill_stream_ = ahead ? driver_->side_stream() : stream_;
  joined_ = ahead;
  if (broken_) repair_locked();
  expect_undo(first, last);
  const std::size_t all = static_cast<std::size_t>(last - first);
  const Op* op = first;
  to_zero_.clear();
  try {
    while (op != last) {
      const std::size_t left = static_cast<std::size_t>(last - op);
      if (op->kind == OpKind::map) {
        op += run_maps(op, left);
        continue;
      }
      if (op->kind == OpKind::zero) {
        to_zero_.push_back({op->at, op->a, op->b});
        ++op;
        continue;
      }
      // Zeroing waits for what follows as long as that touches no mapped memory and marks no point in time.
      if (is_physical(op->kind) && op->kind != OpKind::create) zero_noted();
      if (op->kind == OpKind::copy) {
        op += run_copies(op, left);
      } else if (op->kind == OpKind::unmap) {
        op += run_unmaps(op, left);
      } else {
        run_one(*op);
        ++op;
      }
    }
    zero_noted();
  } catch (...) {  // what is zeroed at last fails with no record left
    undo(first, op);
    if (progress) *progress = {std::min(static_cast<std::size_t>(op - first) + 1, all), wrote_};
    throw;
  }
}

// Undoing may map a run again, or note all slots there are for a repair.
void Space::expect_undo(const Op* first, const Op* last) {
  i64 slots = 0, longest = 0;
  for (const Op* op = first; op != last; ++op) {
    if (op->kind != OpKind::map && op->kind != OpKind::unmap) continue;
    slots += op->c, longest = std::max(longest, op->c);
  }
  const std::size_t most = repairs_.size() + static_cast<std::size_t>(slots);
  if (repairs_.capacity() < most) repairs_.reserve(std::max(most, 2 * repairs_.capacity()));
  if (static_cast<i64>(run_.capacity()) < longest) run_.reserve(2 * longest);
}

// One call for each stretch of what is to be zeroed. The records of several arenas may alternate, and since all write
// the same, their order means nothing.
void Space::zero_noted() {
  if (to_zero_.empty()) return;
  wrote_ = true;
  join_once();
  std::sort(to_zero_.begin(), to_zero_.end(),
            [](const Range& a, const Range& b) { return std::tie(a.arena, a.offset) < std::tie(b.arena, b.offset); });
  for (std::size_t i = 0; i < to_zero_.size();) {
    const Range& first = to_zero_[i];
    i64 end = first.offset + first.bytes;
    for (++i; i < to_zero_.size() && to_zero_[i].arena == first.arena && to_zero_[i].offset <= end; ++i) {
      end = std::max(end, to_zero_[i].offset + to_zero_[i].bytes);
    }
    driver_->zero(at(first.arena, 0) + Address(first.offset), end - first.offset, fill_stream_);
  }
  to_zero_.clear();
}

// Copies what ops[0] says and the records behind it that continue it on both sides; returns how many records it took.
// Not so far that the two sides would meet: one call must not read what it writes.
std::size_t Space::run_copies(const Op* ops, std::size_t count) {
  const i64 distance = std::max(ops[0].a, ops[0].b) - std::min(ops[0].a, ops[0].b);
  i64 bytes = ops[0].c;
  std::size_t taken = 1;
  for (; taken < count; ++taken) {
    const Op& op = ops[taken];
    if (op.kind != OpKind::copy || op.at != ops[0].at || op.a != ops[0].a + bytes || op.b != ops[0].b + bytes) break;
    if (bytes + op.c > distance) break;
    bytes += op.c;
  }
  wrote_ = true;
  join_once();
  driver_->copy(at(ops[0].at, 0) + Address(ops[0].a), at(ops[0].at, 0) + Address(ops[0].b), bytes, fill_stream_);
  return taken;
}

// Maps the longest run of adjacent slots that starts at ops[0]; returns how many records it took. set_access costs per
// call and not per byte, so the whole run gets one. What is to be zeroed in between is noted.
std::size_t Space::run_maps(const Op* ops, std::size_t count) {
  run_.clear();
  std::size_t taken = 0;
  i64 next = ops[0].a;
  while (taken < count) {
    if (!is_physical(ops[taken].kind)) {
      ++taken;
      continue;
    }
    if (ops[taken].kind == OpKind::zero) {
      to_zero_.push_back({ops[taken].at, ops[taken].a, ops[taken].b});
      ++taken;
      continue;
    }
    if (ops[taken].kind != OpKind::map || ops[taken].at != ops[0].at || ops[taken].a != next) break;
    for (i64 i = 0; i < ops[taken].c; ++i) {
      PageHandle& page = pages_.at(ops[taken].b + i);
      if (page == 0) page = driver_->create(page_bytes_);  // destroyed, and an undo could not create it again
      run_.push_back(page);
    }
    next += ops[taken].c;
    ++taken;
  }
  const Address base = at(ops[0].at, ops[0].a);
  const i64 pages = next - ops[0].a;
  SlotSet& slots = arenas_[ops[0].at].slots;
  slots.expect(ops[0].a, next);
  bool open = false;
  try {
    open = driver_->map_run_open(base, page_bytes_, run_.data(), pages);
  } catch (const DeviceError& e) {
    if (e.call() == "map_run") must_be_empty(ops[0].at, ops[0].a, pages);  // half done
    throw;
  }
  slots.set(ops[0].a, next, true);
  try {
    if (!open) driver_->set_access(base, pages * page_bytes_);
  } catch (...) {
    if (try_unmap(ops[0].at, ops[0].a, pages)) {
      slots.set(ops[0].a, next, false);
    } else {
      must_be_empty(ops[0].at, ops[0].a, pages);
    }
    throw;
  }
  settled(ops[0].at, ops[0].a, pages);
  return taken;
}

// Unmaps the longest run of adjacent slots that starts at ops[0], by one call of the driver where that can; returns how
// many records it took.
std::size_t Space::run_unmaps(const Op* ops, std::size_t count) {
  std::size_t taken = 0;
  i64 pages = 0, fence = 0;
  for (; taken < count; ++taken) {
    const Op& op = ops[taken];
    if (!is_physical(op.kind)) continue;
    if (op.kind != OpKind::unmap || op.at != ops[0].at || op.a != ops[0].a + pages) break;
    pages += op.c, fence = std::max(fence, op.d);
  }
  wait_for(fence);
  try {
    driver_->unmap_run(at(ops[0].at, ops[0].a), page_bytes_, pages);
  } catch (const DeviceError& e) {
    for (std::size_t i = 0; e.call() == "unmap_run" && i < taken; ++i) {  // half done
      if (ops[i].kind == OpKind::unmap) must_show(ops[i].at, ops[i].a, ops[i].b, ops[i].c);
    }
    throw;
  }
  arenas_[ops[0].at].slots.set(ops[0].a, ops[0].a + pages, false);
  settled(ops[0].at, ops[0].a, pages);
  return taken;
}

std::vector<Space::Repair>::iterator Space::repair_at(i32 arena, i64 slot) {
  return std::lower_bound(
      repairs_.begin(), repairs_.end(), std::make_pair(arena, slot),
      [](const Repair& r, const std::pair<i32, i64>& at) { return std::make_pair(r.arena, r.slot) < at; });
}

// expect_undo() has taken the memory.
void Space::note_repair(i32 arena, i64 slot, i64 page) {
  const auto at = repair_at(arena, slot);
  if (at != repairs_.end() && at->arena == arena && at->slot == slot) {
    at->page = page;
  } else {
    repairs_.insert(at, {arena, slot, page});
  }
  arenas_[arena].slots.set(slot, slot + 1, true);
  broken_ = true;
}

void Space::must_show(i32 arena, i64 slot, i64 page, i64 count) {
  for (i64 i = 0; i < count; ++i) note_repair(arena, slot + i, page + i);
}

void Space::must_be_empty(i32 arena, i64 slot, i64 count) {
  for (i64 i = 0; i < count; ++i) note_repair(arena, slot + i, -1);
}

void Space::settled(i32 arena, i64 slot, i64 count) {
  if (!broken_) return;
  const auto first = repair_at(arena, slot);
  repairs_.erase(first, repair_at(arena, slot + count));
}

void Space::repair() {
  if (!broken_) return;
  std::lock_guard<std::mutex> lock(mutex_);
  repair_locked();
}

// Nobody knows what these slots show, so each is emptied first; that this fails may mean that it is empty.
void Space::repair_locked() {
  while (!repairs_.empty()) {
    const auto [arena, slot, page] = repairs_.front();
    if (arenas_[arena].slots.slots() > 0) {  // else it went with its arena
      const bool emptied = try_unmap(arena, slot, 1);
      if (page >= 0) {
        const Op back{OpKind::map, arena, slot, page, 1};
        try {
          run_maps(&back, 1);
        } catch (...) {
          must_show(arena, slot, page, 1);  // it may have noted that nobody knows what is there
          throw;
        }
      } else {
        // An unused page knows: a slot that takes it was empty.
        if (!emptied) probe(arena, slot);
        arenas_[arena].slots.set(slot, slot + 1, false);
      }
    }
    settled(arena, slot, 1);
  }
  broken_ = false;
}

void Space::probe(i32 arena, i64 slot) {
  const PageHandle page = driver_->create(page_bytes_);
  try {
    driver_->map(at(arena, slot), page_bytes_, 0, page);
    driver_->unmap(at(arena, slot), page_bytes_);
  } catch (...) {
    driver_->destroy(page);
    throw;
  }
  driver_->destroy(page);
}

void Space::run_one(const Op& op) {
  switch (op.kind) {
    case OpKind::create:
      create(op.a, op.b);
      break;
    case OpKind::destroy: {
      i64 i = 0;
      try {
        for (; i < op.b; ++i) {
          if (pages_[op.a + i] != 0) driver_->destroy(pages_[op.a + i]);
          pages_[op.a + i] = 0;
        }
      } catch (...) {
        while (i-- > 0) pages_[op.a + i] = driver_->create(page_bytes_);  // they held nothing of value
        throw;
      }
      break;
    }
    case OpKind::fence: {
      wait_for(0);  // only to forget what is done, so that the list stays short
      join_once();
      marks_.push_back({op.a, 0});  // first: it may find no memory
      try {
        marks_.back().event = driver_->record(stream_);
      } catch (...) {
        marks_.pop_back();
        throw;
      }
      if (marks_.back().event == 0) marks_.pop_back();
      break;
    }
    case OpKind::load:
    case OpKind::store:
      throw SpecError(std::string(row_of(op.kind).name) + ": this space has no tier");
    default:
      break;
  }
}

PageHandle Space::page_handle(i64 page) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return page >= 0 && page < static_cast<i64>(pages_.size()) ? pages_[page] : 0;
}

void Space::create(i64 first, i64 count) {
  if (static_cast<i64>(pages_.size()) < first + count) pages_.resize(first + count, 0);
  i64 i = 0;
  const auto give_back = [&] {
    for (i64 page = first + i; page-- > first;) {
      try {
        driver_->destroy(pages_[page]);
        pages_[page] = 0;
      } catch (...) {
        // Tried again by the next create. The error that brought us here says more.
      }
    }
  };
  try {
    for (; i < count; ++i) {
      PageHandle& page = pages_[first + i];
      if (page != 0) driver_->destroy(page), page = 0;  // an undo has left it here, and it may have been written
      page = driver_->create(page_bytes_);
    }
  } catch (const OutOfMemory& e) {
    give_back();
    throw OutOfMemory(std::string(e.what()) + ". " + std::to_string(i * page_bytes_) + " of the " +
                      std::to_string(count * page_bytes_) + " bytes asked for could be had and were given back" +
                      free_text());
  } catch (...) {
    give_back();
    throw;
  }
}

std::string Space::free_text() const {
  try {
    return "; the device has " + std::to_string(driver_->available_bytes()) + " bytes free now";
  } catch (...) {
    return "";  // an addition to an error that is on its way
  }
}

void Space::undo(const Op* first, const Op* last) {
  const bool writes =
      std::any_of(first, last, [](const Op& op) { return op.kind == OpKind::zero || op.kind == OpKind::copy; });
  try {
    if (writes) sync(fill_stream_);  // what is about to be unmapped may still be being zeroed or copied to
  } catch (...) {
    // Then the device does nothing any more.
  }
  while (last != first) {
    const Op back = inverse(*--last);
    try {
      if (back.kind == OpKind::map) {
        run_maps(&back, 1);
      } else if (back.kind == OpKind::unmap) {
        run_unmaps(&back, 1);
      } else if (back.kind != OpKind::zero && back.kind != OpKind::copy && back.kind != OpKind::fence) {
        run_one(back);
      } else if (back.kind == OpKind::fence && !marks_.empty() && marks_.back().number == last->a) {
        driver_->forget(marks_.back().event);
        marks_.pop_back();
      }
    } catch (...) {
      // A page that could not be created again is created when it is next mapped; one that could not be destroyed
      // waits for the next create, which tries again.
      if (back.kind == OpKind::map) must_show(back.at, back.a, back.b, back.c);
      if (back.kind == OpKind::unmap) must_be_empty(back.at, back.a, back.c);
    }
  }
}

}  // namespace kvmem
