// The acting half: owns reservations, physical pages and mappings, and executes lists of ops on a driver.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/id_set.h"
#include "base/ops.h"
#include "driver/driver.h"

namespace kvmem {

// The device memory of one pool. It is destroyed after every tensor that shows its memory, because those keep their
// allocator alive.
//
// Invariants: slots of an arena that are not in Arena::mapped map nothing; fences_ is ordered by number; a poisoned
// space executes nothing.
//
// Thread safety: every public function that reads or changes this state locks mutex_, because the mapper executes
// beside the caller. A driver takes one call at a time anyway.
class Space {
 public:
  Space(std::shared_ptr<Driver> driver, i64 page_bytes);
  // Waits for the device, unmaps all slots and destroys all pages. Errors are ignored.
  ~Space();
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;

  // Reserves addresses for arena number `arena`. REQUIRES: the number is unused. Throws what the driver throws, and has
  // changed nothing then.
  void add_arena(i32 arena, i64 slots);
  // Unmaps the arena and releases its addresses; the number is unused then. Never throws.
  void remove_arena(i32 arena);
  Address arena_base(i32 arena) const;
  i64 arena_bytes(i32 arena) const;
  // The arena loads from and stores to `host` from now on, which must outlive it.
  void set_host(i32 arena, char* host);

  struct Progress {
    std::size_t begun = 0;  // the number of ops that were begun, including the one that failed
    bool wrote = false;     // the device has been asked to zero, copy or load
  };
  // Executes the physical ops of [first, last) in order and skips the others. Neighbours become one driver call: a run
  // of maps with one set_access, a run of unmaps, adjacent zeroes, and copies, loads and stores that are contiguous on
  // both sides.
  //
  // If a call fails, the ops executed so far are undone, and the error is thrown; `progress` then tells how far the
  // list had come. If the undo fails too, the space is poisoned and a DeviceError says so. std::bad_alloc can be thrown
  // as well; the undo needs no memory.
  //
  // With `ahead`, the ops concern memory that no kernel uses yet, so the content is written on a stream of the driver's
  // own and not behind the kernels; wait_ahead() waits for it.
  void execute(const Op* first, const Op* last, bool ahead = false, Progress* progress = nullptr);
  bool is_poisoned() const { return poisoned_.load(std::memory_order_acquire); }
  // Throws the DeviceError of every use of a poisoned space: what failed, and that the pool must be discarded.
  [[noreturn]] void refuse_poisoned() const;

  // Returns whether the device has done the work before fence `number`. Does not wait.
  bool has_passed(i64 number);
  // Blocks until the device has done what was executed ahead. Called by the mapper, so that no step overtakes it.
  void wait_ahead();
  // Blocks until the device has done all the work that it was given. Called before arenas are removed. Never throws.
  void drain();

  const DriverInfo& info() const { return driver_->info(); }
  Driver& driver() { return *driver_; }
  // Makes `stream` the one on which kernels use the memory from now on. The device runs its work after all work on the
  // former streams, so memory can pass from those to this one without a wait on the host. Kernels may still be launched
  // on the former streams, and fences cover these too, unless `only` is set. Throws DeviceError for a stream of another
  // device, and has changed nothing then.
  void use_stream(Stream stream, bool only);
  // Returns the driver's handle of a page, or 0 if there is none.
  PageHandle page_handle(i64 page) const;

 private:
  struct Arena {
    Address base = 0;  // of its reserved addresses; 0 if the number is unused
    i64 slots = 0;
    IdSet mapped;          // the slots that are mapped, or that may be after a failed undo
    char* host = nullptr;  // the host slots of its owner
  };
  struct Fence {
    i64 number;
    Event event;
  };
  struct Range {
    i32 arena;
    i64 offset, bytes;
  };

  Address at(i32 arena, i64 slot) const { return arenas_[arena].base + Address(slot * page_bytes_); }
  std::size_t execute_next(const Op* ops, std::size_t count);
  std::size_t map_run(const Op* ops, std::size_t count);
  std::size_t unmap_run(const Op* ops, std::size_t count);
  std::size_t copy_run(const Op* ops, std::size_t count);
  std::size_t move_run(const Op* ops, std::size_t count);
  void set_access(i32 arena, i64 slot, i64 pages);
  void add_zero(const Op& op) { pending_zeroes_.push_back({op.at, op.a, op.b}); }
  void flush_zeroes();
  bool try_unmap(i32 arena, i64 slot, i64 count);
  void poison(const UndoFailed& why) noexcept;
  void create(i64 first, i64 count);
  void destroy(i64 first, i64 count);
  std::string free_text() const;
  void make_fence(i64 number);
  void sync(Stream stream);
  void order_after(Stream earlier, Stream later);
  void join_streams();
  void join_streams_once();
  void undo(const Op* first, const Op* last, const std::exception& cause);
  void undo_one(const Op& op);
  void wait_for(i64 fence);

  std::shared_ptr<Driver> driver_;
  const i64 page_bytes_;
  Stream stream_ = 0;                  // the current stream; ordered after the others when a fence is made
  std::vector<Stream> other_streams_;  // former streams, on which kernels may still be launched
  Stream content_stream_ = 0;          // where the execution in progress zeroes and copies
  bool wrote_ = false;                 // the execution in progress has begun to zero or copy
  bool joined_ = false;                // in the execution in progress, stream_ is ordered after other_streams_
  mutable std::mutex mutex_;
  std::vector<PageHandle> pages_;  // by page id; 0 where there is none
  std::vector<Arena> arenas_;
  std::optional<DeviceError> poison_;  // why it is poisoned; empty if there was no memory for the text
  std::atomic<bool> poisoned_{false};  // once it is set, poison_ does not change
  std::deque<Fence> fences_;           // those whose events are not known to be done, oldest first
  std::vector<PageHandle> run_pages_;  // the pages of one map_run()
  std::vector<Range> pending_zeroes_;  // zero ops that were passed and are not executed yet
};

// Calls f() and returns true, or false if it throws. For destructors and undos, which go on after an error.
template <class F>
bool attempt(F f) noexcept {
  try {
    f();
    return true;
  } catch (...) {
    return false;
  }
}

}  // namespace kvmem
