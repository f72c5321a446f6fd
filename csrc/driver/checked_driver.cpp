// Keeps its own record and compares every call with it before the inner driver sees it.

#include "driver/checked_driver.h"

#include <algorithm>
#include <iterator>

namespace kvmem {
namespace {

constexpr i64 kInvalidValue = 1, kOutOfMemory = 2;  // CUDA's codes

[[noreturn]] void refuse(const char* verb, const std::string& rule) {
  throw DeviceError(std::string("checked driver: ") + verb + ": " + rule, verb, kInvalidValue);
}

bool is_verb(const std::string& name) {
  static const char* const verbs[] = {"",           "reserve", "release", "create", "destroy", "map",
                                      "set_access", "unmap",   "zero",    "copy",   "record",  "wait"};
  return std::find(std::begin(verbs), std::end(verbs), name) != std::end(verbs);
}

}  // namespace

CheckedDriver::CheckedDriver(std::shared_ptr<Driver> inner) : inner_(std::move(inner)) {
  if (!inner_) throw SpecError("a CheckedDriver needs a driver to wrap");
}

// ---- Test controls -------------------------------------------------------------------------------------------------

void CheckedDriver::fail(const std::string& verb, i64 nth, i64 code, bool undo_too) {
  if (!is_verb(verb)) throw SpecError("fail: there is no verb '" + verb + "'");
  if (nth < 1 || code == 0) throw SpecError("fail: nth counts from 1, and code 0 is success");
  std::lock_guard<ForkMutex> lock(mutex_);
  failures_.push_back({verb, nth, code, undo_too});
}

void CheckedDriver::clear_failures() {
  std::lock_guard<ForkMutex> lock(mutex_);
  failures_.clear();
}

i64 CheckedDriver::pending_failures() const {
  std::lock_guard<ForkMutex> lock(mutex_);
  return static_cast<i64>(failures_.size());
}

void CheckedDriver::hold_events(bool hold) {
  std::lock_guard<ForkMutex> lock(mutex_);
  hold_ = hold;
}

void CheckedDriver::complete_events() {
  std::lock_guard<ForkMutex> lock(mutex_);
  for (auto& [event, fence] : events_) fence.held = false;
}

i64 CheckedDriver::held_waits() const {
  std::lock_guard<ForkMutex> lock(mutex_);
  return held_waits_;
}

std::vector<CheckedDriver::Call> CheckedDriver::log() const {
  std::lock_guard<ForkMutex> lock(mutex_);
  return {log_.begin(), log_.end()};
}

void CheckedDriver::clear_log() {
  std::lock_guard<ForkMutex> lock(mutex_);
  log_.clear();
}

CheckedDriver::Live CheckedDriver::live() const {
  std::lock_guard<ForkMutex> lock(mutex_);
  Live live;
  live.reservations = static_cast<i64>(reservations_.size());
  live.pages = static_cast<i64>(pages_.size());
  live.mappings = static_cast<i64>(mappings_.size());
  live.events = static_cast<i64>(events_.size());
  for (const auto& [handle, page] : pages_) live.page_bytes += page.bytes;
  return live;
}

void CheckedDriver::touch(Address at, i64 bytes) const {
  std::lock_guard<ForkMutex> lock(mutex_);
  check_accessible("touch", at, bytes);
}

DriverCounters CheckedDriver::counters() const {
  std::lock_guard<ForkMutex> lock(mutex_);
  return counters_;
}

// ---- Checks --------------------------------------------------------------------------------------------------------

void CheckedDriver::inject(const char* verb) {
  auto due = failures_.end();
  for (auto it = failures_.begin(); it != failures_.end(); ++it) {
    if ((undoing_ && !it->undo_too) || (!it->verb.empty() && it->verb != verb)) continue;
    if (--it->countdown == 0 && due == failures_.end()) due = it;
  }
  if (due == failures_.end()) return;
  const i64 code = due->code;
  failures_.erase(std::remove_if(failures_.begin(), failures_.end(), [](const Failure& f) { return f.countdown <= 0; }),
                  failures_.end());
  const std::string what = std::string("checked driver: ") + verb + " fails as asked with code " + std::to_string(code);
  if (code == kOutOfMemory) throw OutOfMemory(what);
  throw DeviceError(what, verb, code);
}

void CheckedDriver::note(const char* verb, Address at, i64 bytes, std::uint64_t id) {
  if (log_.size() == kLogCalls) log_.pop_front();
  log_.push_back({verb, at, bytes, id});
}

void CheckedDriver::check_size(const char* verb, Address at, i64 bytes) const {
  const i64 granularity = info().granularity_bytes;
  if (bytes <= 0 || bytes % granularity) {
    refuse(verb, "size " + std::to_string(bytes) + " is off the granularity, " + std::to_string(granularity));
  }
  if (at % granularity) refuse(verb, "address " + range_text(at, bytes) + " is off the granularity");
}

void CheckedDriver::check_reserved(const char* verb, Address at, i64 bytes) const {
  auto it = reservations_.upper_bound(at);
  if (it != reservations_.begin()) {
    --it;
    if (at - it->first <= static_cast<Address>(it->second) && bytes <= it->second - static_cast<i64>(at - it->first))
      return;
  }
  refuse(verb, range_text(at, bytes) + " is not reserved, or not by one reserve");
}

bool CheckedDriver::overlaps(Address at, i64 bytes) const {
  auto after = mappings_.lower_bound(at);
  if (after != mappings_.end() && after->first < at + bytes) return true;
  return after != mappings_.begin() && std::prev(after)->first + std::prev(after)->second.bytes > at;
}

template <class Visit>
void CheckedDriver::cover(const char* verb, Address at, i64 bytes, Visit visit) const {
  const Address end = at + bytes;
  auto it = mappings_.upper_bound(at);
  if (it != mappings_.begin()) --it;
  for (Address next = at; next < end; ++it) {
    if (it == mappings_.end() || it->first > next || it->first + it->second.bytes <= next) {
      refuse(verb, range_text(at, bytes) + " is not wholly mapped");
    }
    visit(it->first, it->second);
    next = it->first + it->second.bytes;
  }
}

void CheckedDriver::check_accessible(const char* verb, Address at, i64 bytes) const {
  if (bytes < 0) refuse(verb, "size " + std::to_string(bytes) + " is negative");
  cover(verb, at, bytes, [&](Address, const Mapping& mapping) {
    if (!mapping.accessible) refuse(verb, range_text(at, bytes) + " is touched before set_access");
  });
}

// ---- Address space and pages ---------------------------------------------------------------------------------------

Address CheckedDriver::reserve(i64 bytes, i64 alignment) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.reserve;
  check_size("reserve", 0, bytes);
  if (alignment < 0 || (alignment & (alignment - 1))) refuse("reserve", "alignment is not 0 or a power of two");
  inject("reserve");
  const Address base = inner_->reserve(bytes, alignment);
  if (alignment && base % alignment) refuse("reserve", "the inner driver ignored the alignment");
  reservations_[base] = bytes;
  note("reserve", base, bytes, 0);
  return base;
}

void CheckedDriver::release(Address base, i64 bytes) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.release;
  auto it = reservations_.find(base);
  if (it == reservations_.end() || it->second != bytes) {
    refuse("release", range_text(base, bytes) + " is not exactly what reserve returned");
  }
  if (overlaps(base, bytes)) refuse("release", range_text(base, bytes) + " is released while pages are mapped in it");
  inject("release");
  inner_->release(base, bytes);
  reservations_.erase(it);
  note("release", base, bytes, 0);
}

PageHandle CheckedDriver::create(i64 bytes) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.create;
  check_size("create", 0, bytes);
  inject("create");
  const PageHandle page = inner_->create(bytes);
  if (page == 0 || !pages_.emplace(page, Page{bytes, 0}).second) {
    refuse("create", "the inner driver returned page " + std::to_string(page) + ", which is 0 or lives already");
  }
  note("create", 0, bytes, page);
  return page;
}

void CheckedDriver::destroy(PageHandle page) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.destroy;
  auto it = pages_.find(page);
  if (it == pages_.end()) refuse("destroy", "page " + std::to_string(page) + " does not exist, or no longer");
  if (it->second.mappings) {
    refuse("destroy", "page " + std::to_string(page) + " is destroyed while mapped at " +
                          std::to_string(it->second.mappings) + " address(es)");
  }
  inject("destroy");
  const i64 bytes = it->second.bytes;
  inner_->destroy(page);
  pages_.erase(it);
  note("destroy", 0, bytes, page);
}

// ---- Mappings ------------------------------------------------------------------------------------------------------

void CheckedDriver::map(Address at, i64 bytes, i64 offset, PageHandle page) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.map;
  if (offset != 0) refuse("map", "offset is " + std::to_string(offset) + " and must be 0");
  check_size("map", at, bytes);
  auto it = pages_.find(page);
  if (it == pages_.end()) refuse("map", "page " + std::to_string(page) + " does not exist");
  if (it->second.bytes != bytes) {
    refuse("map", std::to_string(bytes) + " bytes of page " + std::to_string(page) + ", which has " +
                      std::to_string(it->second.bytes) + ": a handle is mapped whole, never in part");
  }
  check_reserved("map", at, bytes);
  if (overlaps(at, bytes)) refuse("map", range_text(at, bytes) + " is mapped already");
  inject("map");
  inner_->map(at, bytes, offset, page);
  mappings_[at] = {bytes, page, false};
  ++it->second.mappings;
  note("map", at, bytes, page);
}

void CheckedDriver::set_access(Address at, i64 bytes) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.set_access;
  check_size("set_access", at, bytes);
  check_reserved("set_access", at, bytes);
  cover("set_access", at, bytes, [&](Address begin, const Mapping& mapping) {
    if (begin < at || begin + mapping.bytes > at + bytes) {
      refuse("set_access", range_text(at, bytes) + " covers a part of the mapping " + range_text(begin, mapping.bytes));
    }
  });
  inject("set_access");
  inner_->set_access(at, bytes);
  for (auto it = mappings_.find(at); it != mappings_.end() && it->first < at + bytes; ++it)
    it->second.accessible = true;
  note("set_access", at, bytes, 0);
}

void CheckedDriver::unmap(Address at, i64 bytes) { unmap_run(at, bytes, 1); }

void CheckedDriver::unmap_run(Address at, i64 page_bytes, i64 count) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.unmap;
  check_size("unmap", at, page_bytes);
  for (i64 i = 0; i < count; ++i) {
    const Address page_at = at + i * page_bytes;
    const auto it = mappings_.find(page_at);
    if (it != mappings_.end() && it->second.bytes == page_bytes) continue;
    refuse("unmap", range_text(page_at, page_bytes) + " is not exactly one mapping: " +
                        (overlaps(page_at, page_bytes) ? "a part of one, or several" : "nothing is mapped there"));
  }
  inject("unmap");
  inner_->unmap_run(at, page_bytes, count);
  for (i64 i = 0; i < count; ++i) {
    const auto it = mappings_.find(at + i * page_bytes);
    const PageHandle page = it->second.page;
    --pages_.find(page)->second.mappings;
    mappings_.erase(it);
    note("unmap", at + i * page_bytes, page_bytes, page);
  }
}

void CheckedDriver::undoing(bool begin) {
  std::lock_guard<ForkMutex> lock(mutex_);
  undoing_ += begin ? 1 : -1;
  inner_->undoing(begin);
}

// ---- Contents and fences -------------------------------------------------------------------------------------------

void CheckedDriver::zero(Address at, i64 bytes, Stream stream) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.zero;
  check_accessible("zero", at, bytes);
  inject("zero");
  inner_->zero(at, bytes, stream);
  note("zero", at, bytes, 0);
}

void CheckedDriver::copy(Address to, Address from, i64 bytes, Stream stream) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.copy;
  check_accessible("copy", to, bytes);
  check_accessible("copy", from, bytes);
  const Address low = std::min(to, from), high = std::max(to, from);
  if (static_cast<i64>(high - low) < bytes) refuse("copy", "source and destination overlap");
  inject("copy");
  inner_->copy(to, from, bytes, stream);
  note("copy", to, bytes, 0);
}

Event CheckedDriver::record(Stream stream) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.record;
  inject("record");
  const Event inner = inner_->record(stream);
  if (inner == 0 && !hold_) return 0;
  const Event event = ++last_event_;
  events_[event] = {inner, hold_};
  note("record", 0, 0, event);
  return event;
}

bool CheckedDriver::done(Event event) {
  std::lock_guard<ForkMutex> lock(mutex_);
  if (event == 0) return true;
  auto it = events_.find(event);
  if (it == events_.end()) refuse("done", "event " + std::to_string(event) + " does not exist, or was forgotten");
  return !it->second.held && inner_->done(it->second.inner);
}

void CheckedDriver::wait(Event event) {
  Event inner = 0;
  {
    std::lock_guard<ForkMutex> lock(mutex_);
    ++counters_.wait;
    if (event != 0) {
      auto it = events_.find(event);
      if (it == events_.end()) refuse("wait", "event " + std::to_string(event) + " does not exist, or was forgotten");
      inner = it->second.inner;
    }
    inject("wait");
    if (event != 0 && events_[event].held) {
      events_[event].held = false;
      ++held_waits_;
    }
    note("wait", 0, 0, event);
  }
  inner_->wait(inner);  // unlocked: it may block, and others may go on meanwhile
}

void CheckedDriver::forget(Event event) {
  std::lock_guard<ForkMutex> lock(mutex_);
  if (event == 0) return;
  auto it = events_.find(event);
  if (it == events_.end())
    refuse("forget", "event " + std::to_string(event) + " does not exist, or was forgotten already");
  inner_->forget(it->second.inner);
  events_.erase(it);
}

void CheckedDriver::order(Event event, Stream later) {
  std::lock_guard<ForkMutex> lock(mutex_);
  if (event == 0) return;
  auto it = events_.find(event);
  if (it == events_.end()) refuse("order", "event " + std::to_string(event) + " does not exist, or was forgotten");
  inner_->order(it->second.inner, later);
}

std::shared_ptr<CheckedDriver> make_checked_driver(std::shared_ptr<Driver> inner) {
  return std::make_shared<CheckedDriver>(std::move(inner));
}

}  // namespace kvmem
