// The acting half: reservations, physical pages and mappings as owned things, and the execution of op lists on a
// driver.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/ops.h"
#include "driver/driver.h"
#include "memory/slot_set.h"

namespace kvmem {

// One reserved address range; gives it back when it dies. Everything mapped in it must be unmapped before.
class Reservation {
 public:
  Reservation(std::shared_ptr<Driver> driver, i64 bytes, i64 alignment)
      : driver_(std::move(driver)), base_(driver_->reserve(bytes, alignment)), bytes_(bytes) {}
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  Address base() const { return base_; }
  i64 bytes() const { return bytes_; }

 private:
  std::shared_ptr<Driver> driver_;
  Address base_;
  i64 bytes_;
};

// Thread-safe: the mapper executes beside the caller. Outlives every tensor that shows its memory, since those hold
// their cache.
class Space {
 public:
  Space(std::shared_ptr<Driver> driver, i64 page_bytes);
  ~Space();
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;

  void add_arena(i32 arena, i64 slots);  // reserves; its number is free
  void remove_arena(i32 arena);          // unmaps and gives back the addresses, and the number
  Address arena_base(i32 arena) const;
  i64 arena_bytes(i32 arena) const;

  struct Progress {
    std::size_t begun = 0;  // records, the one that failed included
    bool wrote = false;     // it has begun to zero or copy
  };
  // Executes the physical records of [first, last) in order, skipping others. Adjacent maps become one run with one
  // set_access, adjacent unmaps one run, neighbouring zeroes one call, and so do copies that continue each other on
  // both sides. A failing call throws, and then everything executed so far has been undone. Where that fails too the
  // space is poisoned: it executes nothing from then on. Host memory may run out, too: what undoing needs is taken
  // before. `ahead`: for memory that no kernel knows yet, whose zeroing need not queue behind the kernels; finish()
  // ends it. `progress` is told how far a call that failed has come.
  void execute(const Op* first, const Op* last, bool ahead = false, Progress* progress = nullptr);
  bool is_poisoned() const { return poisoned_.load(std::memory_order_acquire); }
  // Throws the DeviceError that every use of a poisoned space is: what failed, and that it must be discarded.
  [[noreturn]] void refuse_poisoned() const;

  // Blocks until what was executed ahead is done on the device. For the mapper, whose zeroing no step may overtake.
  void finish();
  // Blocks until the device has done all it was given. For the end of an arena; never throws.
  void drain();

  const DriverInfo& info() const { return driver_->info(); }
  Driver& driver() { return *driver_; }
  // The stream on which kernels use the memory from now on. It goes on after all that was put on those before, so
  // memory may pass from the old to the new without a wait of ours. Unless it is the `only` one from now on, kernels
  // may still come on those before, and fences mind them too. Throws, and nothing has changed, for a stream of another
  // device.
  void use_stream(Stream stream, bool only);
  PageHandle page_handle(i64 page) const;

 private:
  struct Arena {
    std::unique_ptr<Reservation> reservation;
    SlotSet slots;  // those that are mapped now, or may be
  };
  struct Mark {
    i64 number;
    Event event;
  };
  struct Range {
    i32 arena;
    i64 offset, bytes;
  };

  Address at(i32 arena, i64 slot) const { return arenas_[arena].reservation->base() + Address(slot * page_bytes_); }
  std::size_t run_some(const Op* ops, std::size_t count);
  std::size_t run_maps(const Op* ops, std::size_t count);
  std::size_t run_unmaps(const Op* ops, std::size_t count);
  std::size_t run_copies(const Op* ops, std::size_t count);
  void open_run(i32 arena, i64 slot, i64 pages);
  void zero_noted();
  bool try_unmap(i32 arena, i64 slot, i64 count);
  void poison(const HalfDone& why) noexcept;
  void create(i64 first, i64 count);
  void destroy(i64 first, i64 count);
  std::string free_text() const;
  void run_one(const Op& op);
  void sync(Stream stream);
  void go_after(Stream earlier, Stream later);
  void join();
  void join_once();
  void undo(const Op* first, const Op* last, const std::exception& cause);
  void undo_one(const Op& op);
  void wait_for(i64 fence);

  std::shared_ptr<Driver> driver_;
  const i64 page_bytes_;
  Stream stream_ = 0;           // the one used last; it is ordered behind the others when a fence is made
  std::vector<Stream> others_;  // kernels may still come on these
  Stream fill_stream_ = 0;      // where the records being executed zero and copy
  bool wrote_ = false;          // the call in progress has begun to zero or copy
  bool joined_ = false;         // stream_ has been ordered behind the others since they began
  mutable std::mutex mutex_;
  std::vector<PageHandle> pages_;  // by page id, 0 where there is none
  std::vector<Arena> arenas_;
  std::optional<DeviceError> why_;     // it is poisoned; empty if there was no memory for the sentence
  std::atomic<bool> poisoned_{false};  // why_ changes no more then
  std::deque<Mark> marks_;             // events not yet known to be done, oldest first
  std::vector<PageHandle> run_;
  std::vector<Range> to_zero_;  // records that have been passed and wait to be executed
};

}  // namespace kvmem
