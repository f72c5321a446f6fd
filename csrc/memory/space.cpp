// Execution of ops on a driver, and its undo.

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

Space::Space(std::shared_ptr<Driver> driver, i64 page_bytes) : driver_(std::move(driver)), page_bytes_(page_bytes) {
  KVMEM_ASSERT(page_bytes > 0 && page_bytes % info().granularity_bytes == 0, "a page is a multiple of the granularity");
}

Space::~Space() {
  // Pages are unmapped after the work that uses them. If the context is dead every call fails, and the system has freed
  // the memory.
  attempt([this] {
    for (const Fence& fence : fences_) driver_->wait(fence.event);
  });
  for (const Fence& fence : fences_) attempt([&] { driver_->forget(fence.event); });
  for (std::size_t arena = 0; arena < arenas_.size(); ++arena) remove_arena(static_cast<i32>(arena));
  for (PageHandle page : pages_) {
    if (page != 0) attempt([&] { driver_->destroy(page); });
  }
}

// ---- Arenas --------------------------------------------------------------------------------------------------------

void Space::add_arena(i32 number, i64 slots) {
  std::lock_guard<std::mutex> lock(mutex_);
  KVMEM_ASSERT(number >= static_cast<i32>(arenas_.size()) || arenas_[number].base == 0, "the number is unused");
  if (number >= static_cast<i32>(arenas_.size())) arenas_.resize(number + 1);
  Arena arena;
  arena.slots = slots;
  arena.mapped.reserve(slots);
  arena.base = driver_->reserve(slots * page_bytes_, 0);  // the last step that may fail
  arenas_[number] = std::move(arena);
}

void Space::remove_arena(i32 number) {
  std::lock_guard<std::mutex> lock(mutex_);
  Arena& arena = arenas_[number];
  if (arena.base == 0) return;
  while (!arena.mapped.empty()) {
    const i64 from = arena.mapped.first();
    i64 to = from;
    while (to < arena.slots && arena.mapped.has(to)) ++to;
    arena.mapped.erase(from, to - from);
    if (!try_unmap(number, from, to - from)) {
      for (i64 slot = from; slot < to; ++slot) try_unmap(number, slot, 1);  // one page may have failed; try the others
    }
  }
  // After an error the addresses stay reserved, without memory.
  attempt([&] { driver_->release(arena.base, arena.slots * page_bytes_); });
  arena = Arena();
}

Address Space::arena_base(i32 arena) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return arenas_[arena].base;
}

i64 Space::arena_bytes(i32 arena) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return arenas_[arena].slots * page_bytes_;
}

void Space::set_host(i32 arena, char* host) {
  std::lock_guard<std::mutex> lock(mutex_);
  arenas_[arena].host = host;
}

bool Space::try_unmap(i32 arena, i64 slot, i64 count) {
  return attempt([&] { driver_->unmap_run(at(arena, slot), page_bytes_, count); });
}

PageHandle Space::page_handle(i64 page) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return page >= 0 && page < static_cast<i64>(pages_.size()) ? pages_[page] : 0;
}

// ---- Execution -----------------------------------------------------------------------------------------------------

void Space::execute(const Op* first, const Op* last, bool ahead, Progress* progress) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (is_poisoned()) refuse_poisoned();
  wrote_ = false;
  content_stream_ = ahead ? driver_->side_stream() : stream_;
  joined_ = ahead;
  i64 longest = 0;  // the undo may map a run again, and must not need memory for it
  for (const Op* op = first; op != last; ++op) longest = std::max(longest, op->kind == OpKind::unmap ? op->c : 0);
  if (static_cast<i64>(run_pages_.capacity()) < longest) run_pages_.reserve(2 * longest);
  pending_zeroes_.clear();
  const Op* op = first;
  try {
    try {
      while (op != last) op += execute_next(op, static_cast<std::size_t>(last - op));
      flush_zeroes();
    } catch (const UndoFailed&) {
      throw;
    } catch (const std::exception& cause) {  // if the last flush_zeroes() failed, op == last
      if (progress) *progress = {static_cast<std::size_t>(std::min(op + 1, last) - first), wrote_};
      undo(first, op, cause);
      throw;
    }
  } catch (const UndoFailed& e) {
    poison(e);
    refuse_poisoned();
  }
  KVMEM_ASSERT(pending_zeroes_.empty(), "all zeroes were executed");
}

// Executes ops[0] and the ops that can share its driver call. Returns how many ops it took.
std::size_t Space::execute_next(const Op* ops, std::size_t count) {
  const Op& op = ops[0];
  // Zeroes wait until an op touches memory or marks a point in time; nothing can observe them earlier.
  const bool observes = op.kind == OpKind::copy || op.kind == OpKind::unmap || op.kind == OpKind::destroy ||
                        op.kind == OpKind::fence || op.kind == OpKind::load || op.kind == OpKind::store;
  if (observes) flush_zeroes();
  switch (op.kind) {
    case OpKind::map:
      return map_run(ops, count);
    case OpKind::unmap:
      return unmap_run(ops, count);
    case OpKind::copy:
      return copy_run(ops, count);
    case OpKind::zero:
      add_zero(op);
      return 1;
    case OpKind::create:
      create(op.a, op.b);
      return 1;
    case OpKind::destroy:
      destroy(op.a, op.b);
      return 1;
    case OpKind::fence:
      make_fence(op.a);
      return 1;
    case OpKind::load:
    case OpKind::store:
      return move_run(ops, count);
    default:
      return 1;
  }
}

void Space::poison(const UndoFailed& why) noexcept {
  try {
    poison_.emplace(std::string(kPoisoned) + ": " + why.what() + ", so it is not known what is mapped. " + kDiscard,
                    why.call(), why.code());
  } catch (const std::bad_alloc&) {
  }
  poisoned_.store(true, std::memory_order_release);
}

void Space::refuse_poisoned() const {
  KVMEM_ASSERT(is_poisoned(), "only a poisoned space is refused");
  if (poison_) throw *poison_;
  throw DeviceError(std::string(kPoisoned) + ". " + kDiscard);
}

// Executes the pending zeroes, adjacent ones as one call. The ops of several arenas may alternate, and their order does
// not matter, since all write the same value.
void Space::flush_zeroes() {
  if (pending_zeroes_.empty()) return;
  wrote_ = true;
  join_streams_once();
  std::sort(pending_zeroes_.begin(), pending_zeroes_.end(),
            [](const Range& a, const Range& b) { return std::tie(a.arena, a.offset) < std::tie(b.arena, b.offset); });
  for (std::size_t i = 0; i < pending_zeroes_.size();) {
    const Range& first = pending_zeroes_[i];
    i64 end = first.offset + first.bytes;
    for (++i; i < pending_zeroes_.size(); ++i) {
      const Range& next = pending_zeroes_[i];
      if (next.arena != first.arena || next.offset > end) break;
      end = std::max(end, next.offset + next.bytes);
    }
    driver_->zero(at(first.arena, 0) + Address(first.offset), end - first.offset, content_stream_);
  }
  pending_zeroes_.clear();
}

// Executes ops[0] and the copies that continue it on both sides, until source and destination would overlap: one call
// must not read what it writes. Returns how many ops it took.
std::size_t Space::copy_run(const Op* ops, std::size_t count) {
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
  join_streams_once();
  const Address base = at(ops[0].at, 0);
  driver_->copy(base + Address(ops[0].a), base + Address(ops[0].b), bytes, content_stream_);
  return taken;
}

// The same for loads or stores. Nothing overlaps, since one side is host memory.
std::size_t Space::move_run(const Op* ops, std::size_t count) {
  const Op& first = ops[0];
  i64 bytes = first.c;
  std::size_t taken = 1;
  for (; taken < count; ++taken) {
    const Op& op = ops[taken];
    if (!is_physical(op.kind)) continue;
    if (op.kind != first.kind || op.at != first.at || op.a != first.a + bytes || op.b != first.b + bytes) break;
    bytes += op.c;
  }
  const Address device = at(first.at, 0) + Address(first.a);
  char* const host = arenas_[first.at].host + first.b;
  join_streams_once();
  if (first.kind == OpKind::store) {
    driver_->store(host, device, bytes, content_stream_);
  } else {
    wrote_ = true;
    driver_->load(device, host, bytes, content_stream_);
  }
  return taken;
}

// Maps the longest run of adjacent slots that starts at ops[0], with one set_access, which costs per call and not per
// byte. Zeroes within the run become pending. Returns how many ops it took.
std::size_t Space::map_run(const Op* ops, std::size_t count) {
  run_pages_.clear();
  std::size_t taken = 0;
  i64 next = ops[0].a;
  for (; taken < count; ++taken) {
    const Op& op = ops[taken];
    if (!is_physical(op.kind)) continue;
    if (op.kind == OpKind::zero) {
      add_zero(op);
      continue;
    }
    if (op.kind != OpKind::map || op.at != ops[0].at || op.a != next) break;
    for (i64 i = 0; i < op.c; ++i) {
      KVMEM_ASSERT(pages_[op.b + i] != 0, "a mapped page was created");
      run_pages_.push_back(pages_[op.b + i]);
    }
    next += op.c;
  }
  const i64 pages = next - ops[0].a;
  IdSet& mapped = arenas_[ops[0].at].mapped;
  KVMEM_ASSERT(!mapped.has(ops[0].a) && !mapped.has(next - 1), "the slots are unmapped");
  bool accessible = false;
  try {
    accessible = driver_->map_run_open(at(ops[0].at, ops[0].a), page_bytes_, run_pages_.data(), pages);
  } catch (const UndoFailed&) {
    mapped.insert(ops[0].a, pages);  // some may still be mapped
    throw;
  }
  mapped.insert(ops[0].a, pages);
  if (!accessible) set_access(ops[0].at, ops[0].a, pages);
  return taken;
}

// Makes mapped slots accessible; if that fails, unmaps them.
void Space::set_access(i32 arena, i64 slot, i64 pages) {
  try {
    driver_->set_access(at(arena, slot), pages * page_bytes_);
  } catch (const std::exception& cause) {
    undo_call(*driver_, "set_access", cause, [&] { driver_->unmap_run(at(arena, slot), page_bytes_, pages); });
    arenas_[arena].mapped.erase(slot, pages);
    throw;
  }
}

// Waits for the fences of the longest run of adjacent slots that starts at ops[0], and unmaps the run. Returns how many
// ops it took.
std::size_t Space::unmap_run(const Op* ops, std::size_t count) {
  std::size_t taken = 0;
  i64 pages = 0, fence = 0;
  for (; taken < count; ++taken) {
    const Op& op = ops[taken];
    if (!is_physical(op.kind)) continue;
    if (op.kind != OpKind::unmap || op.at != ops[0].at || op.a != ops[0].a + pages) break;
    pages += op.c, fence = std::max(fence, op.d);
  }
  IdSet& mapped = arenas_[ops[0].at].mapped;
  KVMEM_ASSERT(mapped.has(ops[0].a) && mapped.has(ops[0].a + pages - 1), "the slots are mapped");
  wait_for(fence);
  driver_->unmap_run(at(ops[0].at, ops[0].a), page_bytes_, pages);
  mapped.erase(ops[0].a, pages);
  return taken;
}

// Creates all `count` pages, or none.
void Space::create(i64 first, i64 count) {
  if (static_cast<i64>(pages_.size()) < first + count) pages_.resize(first + count, 0);
  i64 i = 0;
  const auto destroy_created = [&](const std::exception& cause) {
    undo_call(*driver_, "create", cause, [&] {
      for (; i > 0; --i) {
        driver_->destroy(pages_[first + i - 1]);
        pages_[first + i - 1] = 0;  // not before: after an error the destructor destroys the page
      }
    });
  };
  try {
    for (; i < count; ++i) {
      KVMEM_ASSERT(pages_[first + i] == 0, "the page is absent");
      pages_[first + i] = driver_->create(page_bytes_);
    }
  } catch (const OutOfMemory& e) {
    const i64 had = i;
    destroy_created(e);
    throw OutOfMemory(std::string(e.what()) + ". " + std::to_string(had * page_bytes_) + " of the " +
                      std::to_string(count * page_bytes_) + " bytes asked for could be had and were given back" +
                      free_text());
  } catch (const std::exception& e) {
    destroy_created(e);
    throw;
  }
}

// Destroys all `count` pages, or none.
void Space::destroy(i64 first, i64 count) {
  i64 i = 0;
  try {
    for (; i < count; ++i) {
      KVMEM_ASSERT(pages_[first + i] != 0, "the page exists");
      driver_->destroy(pages_[first + i]);
      pages_[first + i] = 0;
    }
  } catch (const std::exception& cause) {
    undo_call(*driver_, "destroy", cause, [&] {
      while (i > 0) pages_[first + --i] = driver_->create(page_bytes_);  // a free page's content is of no use
    });
    throw;
  }
}

// Returns a clause for an error message, or "" where the driver cannot say.
std::string Space::free_text() const {
  try {
    return "; the device has " + std::to_string(driver_->available_bytes()) + " bytes free now";
  } catch (...) {
    return "";
  }
}

// ---- Undo ----------------------------------------------------------------------------------------------------------

// Undoes [first, last), newest first. Throws UndoFailed if that fails.
void Space::undo(const Op* first, const Op* last, const std::exception& cause) {
  const bool writes = std::any_of(first, last, [](const Op& op) {
    return op.kind == OpKind::zero || op.kind == OpKind::copy || op.kind == OpKind::load || op.kind == OpKind::store;
  });
  undo_call(*driver_, "a driver call", cause, [&] {
    // The device may still be writing to what is unmapped next. If it cannot be waited for, it does not work any more.
    if (writes) attempt([this] { sync(content_stream_); });
    pending_zeroes_.clear();
    while (last != first) undo_one(*--last);
  });
}

void Space::undo_one(const Op& op) {
  const Op back = inverse(op);
  if (is_physical(op.kind) && back.kind != op.kind)
    execute_next(&back, 1);  // zero, copy, load and store are not undone
  if (op.kind != OpKind::fence || fences_.empty() || fences_.back().number != op.a) return;
  driver_->forget(fences_.back().event);
  fences_.pop_back();
}

}  // namespace kvmem
