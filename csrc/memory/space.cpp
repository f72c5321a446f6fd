#include "memory/space.h"

#include <algorithm>
#include <new>
#include <string>
#include <tuple>
#include <utility>

namespace kvmem {
namespace {

constexpr const char* kPoisoned = "this pool cannot be trusted any more";
constexpr const char* kDiscard = "Discard it with all of its allocators, and make new ones";

}  // namespace

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
  if (is_poisoned()) refuse_poisoned();
  wrote_ = false;
  fill_stream_ = ahead ? driver_->side_stream() : stream_;
  joined_ = ahead;
  i64 longest = 0;  // undoing may map a run again, and there may be no memory by then
  for (const Op* op = first; op != last; ++op) longest = std::max(longest, op->kind == OpKind::unmap ? op->c : 0);
  if (static_cast<i64>(run_.capacity()) < longest) run_.reserve(2 * longest);
  to_zero_.clear();
  const Op* op = first;
  try {
    try {
      while (op != last) op += run_some(op, static_cast<std::size_t>(last - op));
      zero_noted();
    } catch (const HalfDone&) {
      throw;
    } catch (const std::exception& cause) {  // what is zeroed at last fails with no record left
      if (progress) *progress = {static_cast<std::size_t>(std::min(op + 1, last) - first), wrote_};
      undo(first, op, cause);
      throw;
    }
  } catch (const HalfDone& e) {
    poison(e);
    refuse_poisoned();
  }
}

// Executes ops[0] and what goes with it in one call; returns how many records it took.
std::size_t Space::run_some(const Op* ops, std::size_t count) {
  switch (ops[0].kind) {
    case OpKind::map:
      return run_maps(ops, count);
    case OpKind::zero:
      to_zero_.push_back({ops[0].at, ops[0].a, ops[0].b});
      return 1;
    case OpKind::copy:
      zero_noted();
      return run_copies(ops, count);
    case OpKind::unmap:
      zero_noted();
      return run_unmaps(ops, count);
    case OpKind::destroy:
    case OpKind::fence:
      zero_noted();
      run_one(ops[0]);
      return 1;
    default:  // zeroing waits for what follows as long as that touches no mapped memory and marks no point in time
      run_one(ops[0]);
      return 1;
  }
}

// Of the holder of the lock, once: execute() does nothing afterwards.
void Space::poison(const HalfDone& why) noexcept {
  try {
    why_.emplace(std::string(kPoisoned) + ": " + why.what() + ", so it is not known what is mapped. " + kDiscard,
                 why.call(), why.code());
  } catch (const std::bad_alloc&) {
  }
  poisoned_.store(true, std::memory_order_release);
}

void Space::refuse_poisoned() const {
  if (why_) throw *why_;
  throw DeviceError(std::string(kPoisoned) + ". " + kDiscard);
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
      run_.push_back(pages_[ops[taken].b + i]);
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
  } catch (const HalfDone&) {
    slots.set(ops[0].a, next, true);  // some of them may be
    throw;
  }
  slots.set(ops[0].a, next, true);
  if (!open) open_run(ops[0].at, ops[0].a, pages);
  return taken;
}

void Space::open_run(i32 arena, i64 slot, i64 pages) {
  try {
    driver_->set_access(at(arena, slot), pages * page_bytes_);
  } catch (const std::exception& cause) {
    const Undoing mark(*driver_);
    try {
      driver_->unmap_run(at(arena, slot), page_bytes_, pages);
    } catch (const std::exception& undo) {
      HalfDone::raise("set_access", cause, undo);
    }
    arenas_[arena].slots.set(slot, slot + pages, false);
    throw;
  }
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
  driver_->unmap_run(at(ops[0].at, ops[0].a), page_bytes_, pages);
  arenas_[ops[0].at].slots.set(ops[0].a, ops[0].a + pages, false);
  return taken;
}

void Space::run_one(const Op& op) {
  switch (op.kind) {
    case OpKind::create:
      create(op.a, op.b);
      break;
    case OpKind::destroy:
      destroy(op.a, op.b);
      break;
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
  const auto give_back = [&](const std::exception& cause) {
    const Undoing mark(*driver_);
    try {
      for (; i > 0; --i) {
        driver_->destroy(pages_[first + i - 1]);
        pages_[first + i - 1] = 0;
      }
    } catch (const std::exception& undo) {
      HalfDone::raise("create", cause, undo);
    }
  };
  try {
    for (; i < count; ++i) pages_[first + i] = driver_->create(page_bytes_);
  } catch (const OutOfMemory& e) {
    const i64 had = i;
    give_back(e);
    throw OutOfMemory(std::string(e.what()) + ". " + std::to_string(had * page_bytes_) + " of the " +
                      std::to_string(count * page_bytes_) + " bytes asked for could be had and were given back" +
                      free_text());
  } catch (const std::exception& e) {
    give_back(e);
    throw;
  }
}

void Space::destroy(i64 first, i64 count) {
  i64 i = 0;
  try {
    for (; i < count; ++i) {
      driver_->destroy(pages_[first + i]);
      pages_[first + i] = 0;
    }
  } catch (const std::exception& cause) {
    const Undoing mark(*driver_);
    try {
      while (i > 0) pages_[first + --i] = driver_->create(page_bytes_);  // they held nothing of value
    } catch (const std::exception& undo) {
      HalfDone::raise("destroy", cause, undo);
    }
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

// Takes back [first, last), the newest first; HalfDone where that fails.
void Space::undo(const Op* first, const Op* last, const std::exception& cause) {
  const bool writes =
      std::any_of(first, last, [](const Op& op) { return op.kind == OpKind::zero || op.kind == OpKind::copy; });
  const Undoing mark(*driver_);
  try {
    if (writes) sync(fill_stream_);  // what is about to be unmapped may still be being zeroed or copied to
  } catch (...) {
    // Then the device does nothing any more.
  }
  try {
    while (last != first) undo_one(*--last);
  } catch (const std::exception& e) {
    HalfDone::raise("a driver call", cause, e);
  }
}

void Space::undo_one(const Op& op) {
  const Op back = inverse(op);
  if (back.kind == OpKind::map) {
    run_maps(&back, 1);
  } else if (back.kind == OpKind::unmap) {
    run_unmaps(&back, 1);
  } else if (back.kind == OpKind::fence) {
    if (marks_.empty() || marks_.back().number != op.a) return;
    driver_->forget(marks_.back().event);
    marks_.pop_back();
  } else if (back.kind == OpKind::create || back.kind == OpKind::destroy) {
    run_one(back);
  }
}

}  // namespace kvmem
