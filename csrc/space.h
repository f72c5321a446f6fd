// The acting half: reservations, physical pages and mappings as owned things, and the execution of op lists on a
// driver.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "driver.h"
#include "fork_guard.h"
#include "ops.h"

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

// Thread-safe: the mapper executes beside the caller. Dies after every tensor that shows its memory (they share it).
class Space {
 public:
  Space(std::shared_ptr<Driver> driver, i64 page_bytes);
  ~Space();
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;

  i32 add_arena(i64 slots);      // reserves; returns the arena's number, counted from 0
  void remove_arena(i32 arena);  // unmaps and gives back the addresses
  Address arena_base(i32 arena) const;
  i64 arena_bytes(i32 arena) const;

  // Executes the physical records of [first, last) in order, skipping others. Adjacent maps become one run with one
  // set_access. A failing call throws, and then everything executed so far has been undone. Undoing can fail only when
  // the driver fails twice; what could not be undone is then returned through `stuck`.
  void execute(const Op* first, const Op* last, std::vector<Op>* stuck);

  // Blocks until what was executed so far is done on the device. For the mapper, whose zeroing no step may overtake.
  void finish();

  const DriverInfo& info() const { return driver_->info(); }
  Driver& driver() { return *driver_; }
  Stream stream() const { return stream_; }
  void set_stream(Stream stream) { stream_ = stream; }

 private:
  struct Arena {
    std::unique_ptr<Reservation> reservation;
    std::vector<bool> slots;  // which slots are mapped now
  };
  struct Mark {
    i64 number;
    Event event;
  };

  Address at(i32 arena, i64 slot) const { return arenas_[arena].reservation->base() + Address(slot * page_bytes_); }
  std::size_t run_maps(const Op* ops, std::size_t count);
  void run_one(const Op& op);
  void sync();
  void undo(const Op* first, const Op* last, std::vector<Op>* stuck);
  void wait_for(i64 fence);

  std::shared_ptr<Driver> driver_;
  const i64 page_bytes_;
  Stream stream_ = 0;
  mutable std::mutex mutex_;
  std::vector<PageHandle> pages_;  // by page id, 0 where there is none
  std::vector<Arena> arenas_;
  std::deque<Mark> marks_;  // events not yet known to be done, oldest first
  std::vector<PageHandle> run_;
  ForkGuard fork_guard_;
};

}  // namespace kvmem
