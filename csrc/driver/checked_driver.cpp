#include "driver/checked_driver.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/check.h"

namespace kvmem {
namespace {

constexpr i64 kInvalidValue = 1, kOutOfMemory = 2;  // CUDA's error codes

[[noreturn]] void refuse(const char* verb, const std::string& rule) {
  throw DeviceError(std::string("checked driver: ") + verb + ": " + rule, verb, kInvalidValue);
}

bool is_verb(const std::string& name) {
  static const char* const verbs[] = {"",      "reserve", "release", "create", "destroy", "map",    "set_access",
                                      "unmap", "zero",    "copy",    "load",   "store",   "record", "wait"};
  return std::find(std::begin(verbs), std::end(verbs), name) != std::end(verbs);
}

}  // namespace

CheckedDriver::CheckedDriver(std::shared_ptr<Driver> inner) : inner_(std::move(inner)) {
  if (!inner_) throw SpecError("a CheckedDriver needs a driver to wrap");
}

// ---- Test controls -------------------------------------------------------------------------------------------------

void CheckedDriver::fail(const std::string& verb, i64 nth, i64 code, bool undo_too) {
  if (!is_verb(verb)) throw SpecError("verb: got '" + verb + "'; must be a function of a driver, or ''");
  if (nth < 1) throw SpecError("nth: got " + std::to_string(nth) + "; must be at least 1");
  if (code == 0) throw SpecError("code: got 0, which is success; must be an error code");
  std::lock_guard<ForkMutex> lock(mutex_);
  failures_.push_back({verb, nth, code, undo_too});
}

void CheckedDriver::complete_events() {
  std::lock_guard<ForkMutex> lock(mutex_);
  for (auto& [event, fence] : events_) fence.held = false;
}

std::vector<CheckedDriver::Call> CheckedDriver::log() const {
  std::lock_guard<ForkMutex> lock(mutex_);
  return {log_.begin(), log_.end()};
}

CheckedDriver::Live CheckedDriver::live() const {
  std::lock_guard<ForkMutex> lock(mutex_);
  const auto count = [](const auto& map) { return static_cast<i64>(map.size()); };
  Live live{count(reservations_), count(pages_), count(mappings_), count(events_), 0};
  for (const auto& [handle, page] : pages_) live.page_bytes += page.bytes;
  return live;
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

CheckedDriver::Page& CheckedDriver::find_page(const char* verb, PageHandle page) {
  const auto it = pages_.find(page);
  if (it == pages_.end()) refuse(verb, "page " + std::to_string(page) + " does not exist, or was destroyed");
  return it->second;
}

CheckedDriver::Fence& CheckedDriver::find_event(const char* verb, Event event) {
  const auto it = events_.find(event);
  if (it == events_.end()) refuse(verb, "event " + std::to_string(event) + " does not exist, or was forgotten");
  return it->second;
}

void CheckedDriver::log_call(const char* verb, Address at, i64 bytes, std::uint64_t id) {
  if (log_.size() == kLogCalls) log_.pop_front();
  log_.push_back({verb, at, bytes, id});
}

void CheckedDriver::check_size(const char* verb, Address at, i64 bytes) const {
  const i64 granularity = info().granularity_bytes;
  if (bytes <= 0 || bytes % granularity) {
    refuse(verb, "size " + std::to_string(bytes) + " is off the granularity of " + std::to_string(granularity));
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
  refuse(verb, range_text(at, bytes) + " is not reserved, or not by one call of reserve");
}

bool CheckedDriver::overlaps(Address at, i64 bytes) const {
  auto after = mappings_.lower_bound(at);
  if (after != mappings_.end() && after->first < at + bytes) return true;
  return after != mappings_.begin() && std::prev(after)->first + std::prev(after)->second.bytes > at;
}

template <class Visit>
void CheckedDriver::for_cover(const char* verb, Address at, i64 bytes, Visit visit) const {
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
  for_cover(verb, at, bytes, [&](Address, const Mapping& mapping) {
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
  log_call("reserve", base, bytes, 0);
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
  log_call("release", base, bytes, 0);
}

PageHandle CheckedDriver::create(i64 bytes) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.create;
  check_size("create", 0, bytes);
  inject("create");
  const PageHandle page = inner_->create(bytes);
  if (page == 0 || !pages_.emplace(page, Page{bytes, 0}).second) {
    refuse("create", "the inner driver returned page " + std::to_string(page) + ", which is 0 or exists already");
  }
  log_call("create", 0, bytes, page);
  return page;
}

void CheckedDriver::destroy(PageHandle page) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.destroy;
  const auto [bytes, mappings] = find_page("destroy", page);
  if (mappings) {
    refuse("destroy", "page " + std::to_string(page) + " is destroyed while mapped at " + std::to_string(mappings) +
                          " address(es)");
  }
  inject("destroy");
  inner_->destroy(page);
  pages_.erase(page);
  log_call("destroy", 0, bytes, page);
}

// ---- Mappings ------------------------------------------------------------------------------------------------------

void CheckedDriver::map(Address at, i64 bytes, i64 offset, PageHandle page) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.map;
  if (offset != 0) refuse("map", "offset is " + std::to_string(offset) + " and must be 0");
  check_size("map", at, bytes);
  Page& mapped = find_page("map", page);
  if (mapped.bytes != bytes) {
    refuse("map", "page " + std::to_string(page) + " has " + std::to_string(mapped.bytes) + " bytes, and " +
                      std::to_string(bytes) + " are to be mapped: a page is mapped whole, never in part");
  }
  check_reserved("map", at, bytes);
  if (overlaps(at, bytes)) refuse("map", range_text(at, bytes) + " is mapped already");
  inject("map");
  inner_->map(at, bytes, offset, page);
  mappings_[at] = {bytes, page, false};
  ++mapped.mappings;
  log_call("map", at, bytes, page);
}

void CheckedDriver::set_access(Address at, i64 bytes) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.set_access;
  check_size("set_access", at, bytes);
  check_reserved("set_access", at, bytes);
  for_cover("set_access", at, bytes, [&](Address begin, const Mapping& mapping) {
    if (begin < at || begin + mapping.bytes > at + bytes) {
      refuse("set_access", range_text(at, bytes) + " covers a part of the mapping " + range_text(begin, mapping.bytes));
    }
  });
  inject("set_access");
  inner_->set_access(at, bytes);
  for (auto it = mappings_.find(at); it != mappings_.end() && it->first < at + bytes; ++it)
    it->second.accessible = true;
  log_call("set_access", at, bytes, 0);
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
    Page& unmapped = find_page("unmap", page);
    KVMEM_ASSERT(unmapped.mappings > 0, "the page was mapped");
    --unmapped.mappings;
    mappings_.erase(it);
    log_call("unmap", at + i * page_bytes, page_bytes, page);
  }
}

void CheckedDriver::undoing(bool begin) {
  std::lock_guard<ForkMutex> lock(mutex_);
  undoing_ += begin ? 1 : -1;
  KVMEM_ASSERT(undoing_ >= 0, "an undo ends after it has begun");
  inner_->undoing(begin);
}

// ---- Contents and fences -------------------------------------------------------------------------------------------

template <class Inner>
void CheckedDriver::touch_content(i64 DriverCounters::* counter, const char* verb, Address at, i64 bytes,
                                  Inner inner_call) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++(counters_.*counter);
  check_accessible(verb, at, bytes);
  inject(verb);
  inner_call();
  log_call(verb, at, bytes, 0);
}

void CheckedDriver::zero(Address at, i64 bytes, Stream stream) {
  touch_content(&DriverCounters::zero, "zero", at, bytes, [&] { inner_->zero(at, bytes, stream); });
}

void CheckedDriver::load(Address to, const char* from, i64 bytes, Stream stream) {
  touch_content(&DriverCounters::load, "load", to, bytes, [&] { inner_->load(to, from, bytes, stream); });
}

void CheckedDriver::store(char* to, Address from, i64 bytes, Stream stream) {
  touch_content(&DriverCounters::store, "store", from, bytes, [&] { inner_->store(to, from, bytes, stream); });
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
  log_call("copy", to, bytes, 0);
}

Event CheckedDriver::record(Stream stream) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.record;
  inject("record");
  const Event inner = inner_->record(stream);
  if (inner == 0 && !hold_) return 0;
  const Event event = ++last_event_;
  events_[event] = {inner, hold_};
  log_call("record", 0, 0, event);
  return event;
}

bool CheckedDriver::done(Event event) {
  std::lock_guard<ForkMutex> lock(mutex_);
  if (event == 0) return true;
  const Fence& fence = find_event("done", event);
  return !fence.held && inner_->done(fence.inner);
}

void CheckedDriver::wait(Event event) {
  Event inner = 0;
  {
    std::lock_guard<ForkMutex> lock(mutex_);
    ++counters_.wait;
    Fence* const fence = event != 0 ? &find_event("wait", event) : nullptr;
    inject("wait");
    if (fence) {
      inner = fence->inner;
      held_waits_ += std::exchange(fence->held, false);
    }
    log_call("wait", 0, 0, event);
  }
  inner_->wait(inner);  // without the lock, because it may block
}

void CheckedDriver::forget(Event event) {
  std::lock_guard<ForkMutex> lock(mutex_);
  if (event == 0) return;
  inner_->forget(find_event("forget", event).inner);
  events_.erase(event);
}

void CheckedDriver::order(Event event, Stream later) {
  std::lock_guard<ForkMutex> lock(mutex_);
  if (event == 0) return;
  inner_->order(find_event("order", event).inner, later);
}

}  // namespace kvmem
