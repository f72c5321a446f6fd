// A wrapper around any driver, for tests: it refuses what CUDA's documentation forbids, fails calls on request, can
// hold events back, and counts what is held.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/fork_guard.h"
#include "driver/driver.h"

namespace kvmem {

// It keeps a record of all reservations, pages, mappings and events, and compares each call with it before the inner
// driver gets the call. Thread safety: mutex_ guards everything, and is held during the inner driver's calls, except
// during wait().
class CheckedDriver final : public Driver {
 public:
  // Throws SpecError if `inner` is null.
  explicit CheckedDriver(std::shared_ptr<Driver> inner);

  // --- test controls ---
  // Makes the n-th call (1 is the next) of `verb` fail once with CUDA's `code`: 2 is an OutOfMemory, any other a
  // DeviceError. `verb` is reserve, release, create, destroy, map, set_access, unmap, zero, copy, load, store, record,
  // wait, or "" for any of them. The failing call does not reach the inner driver. Undoing calls (rule 8 of driver.h)
  // neither count nor fail, unless `undo_too` is set. Several failures may be pending. Throws SpecError for another
  // verb, n or code.
  void fail(const std::string& verb, i64 nth, i64 code, bool undo_too = false);
  void clear_failures() {
    locked([this] { failures_.clear(); });
  }
  i64 pending_failures() const {
    return locked([this] { return static_cast<i64>(failures_.size()); });
  }

  // While events are held, the events that record() returns are not done, whatever the inner driver says. wait() on a
  // held event does not block: it completes that event alone and is counted in held_waits(), so a test cannot hang and
  // sees that the event was waited for.
  void hold_events(bool hold) {
    locked([=] { hold_ = hold; });
  }
  void complete_events();  // completes all events held so far
  i64 held_waits() const {
    return locked([this] { return held_waits_; });
  }

  struct Call {
    std::string verb;
    Address at;        // 0 where the verb has none
    i64 bytes;         // 0 where the verb has none
    std::uint64_t id;  // the page (create: the new one), or the event
  };
  std::vector<Call> log() const;  // the last successful calls, kLogCalls at most, oldest first
  void clear_log() {
    locked([this] { log_.clear(); });
  }
  static constexpr size_t kLogCalls = 1 << 16;

  // What exists now: all zero if nothing has leaked.
  struct Live {
    i64 reservations = 0, pages = 0, mappings = 0, events = 0, page_bytes = 0;
  };
  Live live() const;

  // Throws DeviceError unless all of the range is mapped and accessible, as a kernel that uses it needs.
  void touch(Address at, i64 bytes) const {
    locked([=] { check_accessible("touch", at, bytes); });
  }

  // --- the interface of driver.h ---
  const DriverInfo& info() const override { return inner_->info(); }
  DriverCounters counters() const override {
    return locked([this] { return counters_; });
  }
  i64 physical_bytes() const override { return inner_->physical_bytes(); }
  i64 available_bytes() const override { return inner_->available_bytes(); }
  Address reserve(i64 bytes, i64 alignment) override;
  void release(Address base, i64 bytes) override;
  PageHandle create(i64 bytes) override;
  void destroy(PageHandle page) override;
  void map(Address at, i64 bytes, i64 offset, PageHandle page) override;
  void set_access(Address at, i64 bytes) override;
  void unmap(Address at, i64 bytes) override;
  void unmap_run(Address at, i64 page_bytes, i64 count) override;  // counts as one call, as on CUDA
  void zero(Address at, i64 bytes, Stream stream) override;
  void copy(Address to, Address from, i64 bytes, Stream stream) override;
  void load(Address to, const char* from, i64 bytes, Stream stream) override;
  void store(char* to, Address from, i64 bytes, Stream stream) override;
  Event record(Stream stream) override;
  bool done(Event event) override;
  void wait(Event event) override;
  void forget(Event event) override;
  void check_stream(Stream stream) const override { inner_->check_stream(stream); }
  Stream side_stream() override { return inner_->side_stream(); }
  void order(Event event, Stream later) override;
  void wait_for_device() override { inner_->wait_for_device(); }
  void undoing(bool begin) override;

  // map_run() is inherited: it makes one call for each page, each of which can be made to fail.

 private:
  struct Page {
    i64 bytes;
    i64 mappings;
  };
  struct Mapping {
    i64 bytes;
    PageHandle page;
    bool accessible;
  };
  struct Fence {
    Event inner;
    bool held;
  };
  struct Failure {
    std::string verb;
    i64 countdown;
    i64 code;
    bool undo_too;
  };
  using Mappings = std::map<Address, Mapping>;

  template <class F>
  auto locked(F f) const -> decltype(f()) {
    std::lock_guard<ForkMutex> lock(mutex_);
    return f();
  }
  void inject(const char* verb);  // throws if a failure is due
  void log_call(const char* verb, Address at, i64 bytes, std::uint64_t id);
  void check_size(const char* verb, Address at, i64 bytes) const;
  void check_reserved(const char* verb, Address at, i64 bytes) const;
  Page& find_page(const char* verb, PageHandle page);
  Fence& find_event(const char* verb, Event event);
  // Calls visit(start, mapping) for the mappings that cover [at, at + bytes). Refuses a range with a gap.
  template <class Visit>
  void for_cover(const char* verb, Address at, i64 bytes, Visit visit) const;
  bool overlaps(Address at, i64 bytes) const;
  void check_accessible(const char* verb, Address at, i64 bytes) const;
  // A call that reads or writes one range: counted, checked, failed on request, logged.
  template <class Inner>
  void touch_content(i64 DriverCounters::* counter, const char* verb, Address at, i64 bytes, Inner inner_call);

  const std::shared_ptr<Driver> inner_;
  mutable ForkMutex mutex_{"the checked driver"};
  DriverCounters counters_;
  std::map<Address, i64> reservations_;
  std::unordered_map<PageHandle, Page> pages_;
  Mappings mappings_;
  std::unordered_map<Event, Fence> events_;
  Event last_event_ = 0;
  std::vector<Failure> failures_;
  i64 undoing_ = 0;  // how many callers are undoing (rule 8)
  bool hold_ = false;
  i64 held_waits_ = 0;
  std::deque<Call> log_;
};

}  // namespace kvmem
