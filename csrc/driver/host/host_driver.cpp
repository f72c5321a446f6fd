// The host driver. Its physical memory is one sparse file (memfd), a page is a range of the file, and map() is
// mmap(MAP_FIXED).
//
// The driver checks the rules of driver.h itself, because the kernel does not: mmap(MAP_FIXED) silently replaces what
// is mapped at an address, and a mapping of a destroyed page would read zeros.
//
// Thread safety: mutex_ guards all state. zero() and copy() release it before they touch bytes.

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "base/check.h"
#include "base/fork_guard.h"
#include "driver/driver.h"
#include "driver/host/host_file.h"
#include "driver/host/host_limits.h"
#include "driver/host/host_pieces.h"

namespace kvmem {
namespace {

[[noreturn]] void refuse(const char* call, const std::string& why) {
  throw DeviceError(std::string("the host driver: ") + call + ": " + why, call, EINVAL);
}

class HostDriver final : public Driver {
 public:
  explicit HostDriver(bool holes_fault) : file_(holes_fault) {
    info_.name = "host";
    info_.granularity_bytes = sysconf(_SC_PAGESIZE);
    info_.recommended_bytes = round_up(64 * 1024, info_.granularity_bytes);
    info_.total_bytes = host_total_bytes();
    info_.fresh_pages_are_zero = true;
    info_.maps_cheaply = true;
    info_.most_pages = kMostPages;
  }
  ~HostDriver() override;

  const DriverInfo& info() const override { return info_; }
  DriverCounters counters() const override {
    std::lock_guard<ForkMutex> lock(mutex_);
    return counters_;
  }
  i64 physical_bytes() const override {
    std::lock_guard<ForkMutex> lock(mutex_);
    return file_.physical_bytes();
  }
  i64 available_bytes() const override;

  Address reserve(i64 bytes, i64 alignment) override;
  void release(Address base, i64 bytes) override;
  PageHandle create(i64 bytes) override;
  void destroy(PageHandle page) override;
  void map(Address at, i64 bytes, i64 offset, PageHandle page) override;
  void set_access(Address at, i64 bytes) override;
  void unmap(Address at, i64 bytes) override { unmap_run(at, bytes, 1); }
  // The pages are inaccessible, so that their use before set_access() faults as it does on a GPU.
  void map_run(Address at, i64 page_bytes, const PageHandle* pages, i64 count) override {
    map_pages(at, page_bytes, pages, count, false);
  }
  // The kernel sets the protection together with the mapping, which saves a second change of its tables.
  bool map_run_open(Address at, i64 page_bytes, const PageHandle* pages, i64 count) override {
    map_pages(at, page_bytes, pages, count, true);
    return true;
  }
  void unmap_run(Address at, i64 page_bytes, i64 count) override;

  void zero(Address at, i64 bytes, Stream) override {
    std::memset(accessible(&DriverCounters::zero, "zero", at, bytes), 0, bytes);
  }
  void copy(Address to, Address from, i64 bytes, Stream stream) override;
  void load(Address to, const char* from, i64 bytes, Stream) override {
    std::memcpy(accessible(&DriverCounters::load, "load", to, bytes), from, bytes);
  }
  void store(char* to, Address from, i64 bytes, Stream) override {
    std::memcpy(to, accessible(&DriverCounters::store, "store", from, bytes), bytes);
  }

  // All work is done when a call returns, so the only event is the completed one.
  Event record(Stream) override {
    count(&DriverCounters::record, [] {});
    return 0;
  }
  bool done(Event) override { return true; }
  void wait(Event) override {
    count(&DriverCounters::wait, [] {});
  }
  void forget(Event) override {}
  void undoing(bool begin) override {
    std::lock_guard<ForkMutex> lock(mutex_);
    undoing_ += begin ? 1 : -1;
    KVMEM_ASSERT(undoing_ >= 0, "an undo ends after it has begun");
  }

 private:
  static constexpr const char* kName = "the host driver";
  static constexpr i64 kMostPages = 1 << 15;
  static_assert(kMostPages < 65'530, "a page may need a kernel mapping of its own, and Linux allows this many");
  struct Page {
    i64 bytes;
    i64 mappings;
  };
  // Pages that are adjacent in the file, so that one mmap() maps them.
  struct Run {
    i64 first, count, offset;
  };

  // Counts a call and runs its checks under the lock. The caller does the work without the lock, since it may take
  // long.
  template <class Checks>
  void count(i64 DriverCounters::* counter, Checks checks) {
    std::lock_guard<ForkMutex> lock(mutex_);
    ++(counters_.*counter);
    checks();
  }
  PageHandle handle_of(i64 offset) const { return static_cast<PageHandle>(offset / info_.granularity_bytes + 1); }
  i64 offset_of(PageHandle page) const { return static_cast<i64>(page - 1) * info_.granularity_bytes; }
  void check_size(const char* call, Address at, i64 bytes) const;
  HostPieces& reservation(const char* call, Address at, i64 bytes);
  Page& page_of(const char* call, PageHandle page, i64 bytes);
  void check_accessible(const char* call, Address at, i64 bytes);
  // Counts a call, and returns where it may write or read.
  void* accessible(i64 DriverCounters::* counter, const char* call, Address at, i64 bytes) {
    count(counter, [&] { check_accessible(call, at, bytes); });
    return reinterpret_cast<void*>(at);
  }
  // Fills pages_of_call_ and runs_ for these pages.
  void find_runs(i64 page_bytes, const PageHandle* pages, i64 count);
  void map_pages(Address at, i64 page_bytes, const PageHandle* pages, i64 count, bool accessible);
  // Applies `change` to the pieces of a reservation, and updates the number of kernel mappings that the process holds.
  template <class Change>
  void account(HostPieces& pieces, Change change) {
    const i64 before = pieces.count();
    change(pieces);
    budget_.add(pieces.count() - before);
  }

  DriverInfo info_;
  MappingBudget budget_;
  HostFile file_;
  mutable ForkMutex mutex_{kName};
  DriverCounters counters_;
  i64 created_bytes_ = 0;
  i64 undoing_ = 0;  // how many callers are undoing (rule 8)
  std::unordered_map<PageHandle, Page> pages_;
  std::map<Address, HostPieces> reservations_;
  std::vector<Run> runs_;             // of the call in progress
  std::vector<Page*> pages_of_call_;  // of the call in progress
};

HostDriver::~HostDriver() {
  for (auto& [base, pieces] : reservations_) {
    budget_.add(-pieces.count());
    // A forked child has no mapping there (MADV_DONTFORK), and may use the addresses for something else.
    if (!file_.forked()) munmap(reinterpret_cast<void*>(base), pieces.bytes());
  }
}

i64 HostDriver::available_bytes() const {
  std::lock_guard<ForkMutex> lock(mutex_);
  // The system counts created pages as free until they are first touched.
  const i64 untouched = std::max<i64>(0, created_bytes_ - file_.physical_bytes());
  return std::max<i64>(0, std::min(host_available_bytes() - untouched, info_.total_bytes - created_bytes_));
}

// ---- Checks --------------------------------------------------------------------------------------------------------

void HostDriver::check_size(const char* call, Address at, i64 bytes) const {
  const i64 granularity = info_.granularity_bytes;
  if (bytes <= 0 || bytes % granularity || at % granularity) {
    refuse(call,
           range_text(at, bytes) + " is not a positive multiple of the granularity, " + std::to_string(granularity));
  }
}

HostPieces& HostDriver::reservation(const char* call, Address at, i64 bytes) {
  auto it = reservations_.upper_bound(at);
  if (it == reservations_.begin() || !std::prev(it)->second.contains(at, bytes)) {
    refuse(call, range_text(at, bytes) + " does not lie in one reserved range");
  }
  return std::prev(it)->second;
}

HostDriver::Page& HostDriver::page_of(const char* call, PageHandle page, i64 bytes) {
  auto it = pages_.find(page);
  if (it == pages_.end()) refuse(call, "there is no page " + std::to_string(page));
  if (it->second.bytes != bytes) {
    refuse(call, "page " + std::to_string(page) + " has " + std::to_string(it->second.bytes) +
                     " bytes and is mapped whole, not " + std::to_string(bytes));
  }
  return it->second;
}

void HostDriver::check_accessible(const char* call, Address at, i64 bytes) {
  if (bytes < 0) refuse(call, "size " + std::to_string(bytes) + " is negative");
  HostPieces& pieces = reservation(call, at, bytes);
  if (bytes && !pieces.all(at, bytes, [](const auto& piece) { return piece.accessible; })) {
    refuse(call, range_text(at, bytes) + " is not wholly mapped and accessible (map, then set_access)");
  }
}

// ---- Address space -------------------------------------------------------------------------------------------------

Address HostDriver::reserve(i64 bytes, i64 alignment) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.reserve;
  check_size("reserve", 0, bytes);
  if (alignment < 0 || (alignment & (alignment - 1))) refuse("reserve", "alignment is not 0 or a power of two");
  const i64 slack = alignment > info_.granularity_bytes ? alignment : 0;
  if (bytes > (i64{1} << 62) - slack) {
    throw OutOfMemory("the host driver: reserve of " + std::to_string(bytes) +
                      " bytes is more than an address space holds");
  }
  budget_.check_map(1);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* got = mmap(nullptr, bytes + slack, file_.hole_protection(), flags, -1, 0);
  if (got == MAP_FAILED) system_failed("reserve", "mmap", std::to_string(bytes) + " bytes");
  Address base = reinterpret_cast<Address>(got);
  if (slack) {
    const Address aligned = (base + alignment - 1) & ~static_cast<Address>(alignment - 1);
    if (aligned > base) munmap(got, aligned - base);
    const Address end = base + bytes + slack;
    if (end > aligned + bytes) munmap(reinterpret_cast<void*>(aligned + bytes), end - (aligned + bytes));
    base = aligned;
  }
  madvise(reinterpret_cast<void*>(base), bytes, MADV_DONTFORK);  // a failure is harmless, since holes have no content
  try {
    reservations_.emplace(base, HostPieces(base, bytes));
  } catch (...) {
    munmap(reinterpret_cast<void*>(base), bytes);
    throw;
  }
  budget_.add(1);
  return base;
}

void HostDriver::release(Address base, i64 bytes) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.release;
  auto it = reservations_.find(base);
  if (it == reservations_.end() || it->second.bytes() != bytes) {
    refuse("release", range_text(base, bytes) + " is not what reserve returned");
  }
  if (it->second.offset_at(base) != HostPieces::kHole || it->second.count() != 1) {
    refuse("release", range_text(base, bytes) + " still has pages mapped in it");
  }
  if (munmap(reinterpret_cast<void*>(base), bytes) != 0) system_failed("release", "munmap", range_text(base, bytes));
  reservations_.erase(it);
  budget_.add(-1);
}

// ---- Pages ---------------------------------------------------------------------------------------------------------

PageHandle HostDriver::create(i64 bytes) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.create;
  check_size("create", 0, bytes);
  // The file is sparse, so the system would refuse a page at its first touch only, by a signal.
  if (bytes > info_.total_bytes - created_bytes_) {
    throw OutOfMemory("the host driver: create of " + std::to_string(bytes) +
                      " bytes: " + std::to_string(created_bytes_) + " of " + std::to_string(info_.total_bytes) +
                      " bytes of memory are already created; destroy pages first");
  }
  const i64 offset = file_.find_free(bytes);
  const PageHandle page = handle_of(offset);
  pages_[page] = {bytes, 0};
  file_.allocate(offset, bytes);
  created_bytes_ += bytes;
  return page;
}

void HostDriver::destroy(PageHandle page) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.destroy;
  auto it = pages_.find(page);
  if (it == pages_.end()) refuse("destroy", "there is no page " + std::to_string(page));
  if (it->second.mappings) {
    refuse("destroy", "page " + std::to_string(page) + " is still mapped at " + std::to_string(it->second.mappings) +
                          " address(es)");
  }
  file_.free(offset_of(page), it->second.bytes);
  created_bytes_ -= it->second.bytes;
  KVMEM_ASSERT(created_bytes_ >= 0, "no more bytes are destroyed than were created");
  pages_.erase(it);
}

// ---- Mappings ------------------------------------------------------------------------------------------------------

void HostDriver::map(Address at, i64 bytes, i64 offset, PageHandle page) {
  if (offset != 0) refuse("map", "offset is " + std::to_string(offset) + "; a page is mapped whole, from offset 0");
  map_run(at, bytes, &page, 1);
}

void HostDriver::find_runs(i64 page_bytes, const PageHandle* pages, i64 count) {
  runs_.clear();
  pages_of_call_.clear();
  for (i64 i = 0; i < count; ++i) {
    pages_of_call_.push_back(&page_of("map", pages[i], page_bytes));
    const i64 offset = offset_of(pages[i]);
    if (!runs_.empty() && runs_.back().offset + runs_.back().count * page_bytes == offset) {
      ++runs_.back().count;
    } else {
      runs_.push_back({i, 1, offset});
    }
  }
}

void HostDriver::map_pages(Address at, i64 page_bytes, const PageHandle* pages, i64 count, bool accessible) {
  if (count <= 0) return;
  std::lock_guard<ForkMutex> lock(mutex_);
  check_size("map", at, page_bytes);
  HostPieces& pieces = reservation("map", at, page_bytes * count);
  if (!pieces.all(at, page_bytes * count, [](const auto& piece) { return piece.offset == HostPieces::kHole; })) {
    refuse("map", range_text(at, page_bytes * count) + " is already mapped, in part or whole");
  }
  find_runs(page_bytes, pages, count);
  const i64 runs = static_cast<i64>(runs_.size());
  budget_.check_map(runs + 1, undoing_ > 0);  // one more where they split the hole in which they lie
  pieces.reserve(runs);
  counters_.set_access += accessible;
  for (const Run& run : runs_) {
    ++counters_.map;
    try {
      file_.map(at + run.first * page_bytes, run.count * page_bytes, run.offset, accessible);
    } catch (const Error& cause) {
      if (run.first && !file_.unmap(at, run.first * page_bytes)) {
        UndoFailed::raise("map_run", cause, DeviceError(std::strerror(errno), "mmap", errno));
      }
      throw;
    }
  }
  account(pieces, [&](HostPieces& p) {
    for (const Run& run : runs_) p.map(at + run.first * page_bytes, run.count * page_bytes, run.offset, accessible);
  });
  for (Page* page : pages_of_call_) ++page->mappings;
}

void HostDriver::set_access(Address at, i64 bytes) {
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.set_access;
  check_size("set_access", at, bytes);
  HostPieces& pieces = reservation("set_access", at, bytes);
  if (!pieces.all(at, bytes, [](const auto& piece) { return piece.offset != HostPieces::kHole; })) {
    refuse("set_access", range_text(at, bytes) + " is not wholly mapped");
  }
  pieces.reserve(1);
  if (mprotect(reinterpret_cast<void*>(at), bytes, PROT_READ | PROT_WRITE) != 0) {
    const int code = errno;
    // mprotect() may have changed some of the mappings before it failed.
    pieces.each(at, bytes, [](Address begin, Address end, const HostPieces::Piece& piece) {
      if (!piece.accessible) mprotect(reinterpret_cast<void*>(begin), end - begin, PROT_NONE);
    });
    errno = code;
    system_failed("set_access", "mprotect", range_text(at, bytes));
  }
  account(pieces, [&](HostPieces& p) { p.set_accessible(at, bytes); });
}

void HostDriver::unmap_run(Address at, i64 page_bytes, i64 count) {
  if (count <= 0) return;
  std::lock_guard<ForkMutex> lock(mutex_);
  ++counters_.unmap;
  check_size("unmap", at, page_bytes);
  HostPieces& pieces = reservation("unmap", at, page_bytes * count);
  pages_of_call_.clear();
  for (i64 i = 0; i < count; ++i) {
    const i64 offset = pieces.offset_at(at + i * page_bytes);
    if (offset == HostPieces::kHole) refuse("unmap", range_text(at + i * page_bytes, page_bytes) + " is not mapped");
    pages_of_call_.push_back(&page_of("unmap", handle_of(offset), page_bytes));
  }
  pieces.reserve(1);
  budget_.check_unmap(pieces.growth_of_unmap(at, page_bytes * count), undoing_ > 0);
  if (!file_.unmap(at, page_bytes * count)) system_failed("unmap", "mmap", range_text(at, page_bytes * count));
  account(pieces, [&](HostPieces& p) { p.unmap(at, page_bytes * count); });
  for (Page* page : pages_of_call_) {
    KVMEM_ASSERT(page->mappings > 0, "the page was mapped");
    --page->mappings;
  }
}

// ---- Contents ------------------------------------------------------------------------------------------------------

void HostDriver::copy(Address to, Address from, i64 bytes, Stream) {
  count(&DriverCounters::copy, [&] {
    check_accessible("copy", to, bytes);
    check_accessible("copy", from, bytes);
  });
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
}

}  // namespace

std::shared_ptr<Driver> make_host_driver(bool holes_fault) {
#ifdef KVMEM_DEBUG
  holes_fault = true;
#endif
  return std::make_shared<HostDriver>(holes_fault);
}

}  // namespace kvmem
