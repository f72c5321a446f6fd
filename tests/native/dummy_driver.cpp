// A third driver, whole: one memfd a page, one call of the system's a verb. tests/driver/test_third_driver.py builds
// this file into a module beside kvmem._core and enters it in the registry of devices, which is all that a new driver
// takes.

#include <fcntl.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "base/fork_guard.h"
#include "driver/driver.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvmem;

namespace {

class DummyDriver final : public Driver {
 public:
  DummyDriver() {
    info_.name = "dummy";
    info_.granularity_bytes = sysconf(_SC_PAGESIZE);
    info_.recommended_bytes = 16 * info_.granularity_bytes;
    info_.total_bytes = i64{1} << 30;
    info_.fresh_pages_are_zero = true;
    info_.creates_ahead = info_.tells_free_bytes = true;
    info_.default_guard_tokens = 3;
    info_.default_ahead_tokens = 5;
  }
  ~DummyDriver() override {
    for (const auto& [page, bytes] : pages_) close(file_of(page));
  }

  const DriverInfo& info() const override { return info_; }
  DriverCounters counters() const override {
    std::lock_guard<ForkMutex> lock(mutex_);
    return counters_;
  }
  i64 physical_bytes() const override {
    std::lock_guard<ForkMutex> lock(mutex_);
    return created_bytes_;
  }
  i64 available_bytes() const override { return info_.total_bytes - physical_bytes(); }

  Address reserve(i64 bytes, i64) override {
    const auto lock = begin(&DriverCounters::reserve);
    void* got = mmap(nullptr, bytes, PROT_NONE, kHole, -1, 0);
    check(got != MAP_FAILED, "mmap");
    return reinterpret_cast<Address>(got);
  }
  void release(Address base, i64 bytes) override {
    const auto lock = begin(&DriverCounters::release);
    check(munmap(at_address(base), bytes) == 0, "munmap");
  }
  PageHandle create(i64 bytes) override {
    const auto lock = begin(&DriverCounters::create);
    if (bytes > info_.total_bytes - created_bytes_) throw OutOfMemory("the dummy driver has no more");
    const int file = memfd_create("dummy", MFD_CLOEXEC);
    check(file >= 0, "memfd_create");
    check(ftruncate(file, bytes) == 0, "ftruncate");
    pages_[file + 1] = bytes;
    created_bytes_ += bytes;
    return file + 1;
  }
  void destroy(PageHandle page) override {
    const auto lock = begin(&DriverCounters::destroy);
    check(close(file_of(page)) == 0, "close");
    created_bytes_ -= pages_[page];
    pages_.erase(page);
  }
  void map(Address at, i64 bytes, i64 offset, PageHandle page) override {
    const auto lock = begin(&DriverCounters::map);
    check(mmap(at_address(at), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, file_of(page), offset) != MAP_FAILED, "mmap");
  }
  void set_access(Address at, i64 bytes) override {
    const auto lock = begin(&DriverCounters::set_access);
    check(mprotect(at_address(at), bytes, PROT_READ | PROT_WRITE) == 0, "mprotect");
  }
  void unmap(Address at, i64 bytes) override {
    const auto lock = begin(&DriverCounters::unmap);
    check(mmap(at_address(at), bytes, PROT_NONE, kHole | MAP_FIXED, -1, 0) != MAP_FAILED, "mmap");
  }
  void zero(Address at, i64 bytes, Stream) override {
    const auto lock = begin(&DriverCounters::zero);
    std::memset(at_address(at), 0, bytes);
  }
  void copy(Address to, Address from, i64 bytes, Stream) override {
    const auto lock = begin(&DriverCounters::copy);
    std::memcpy(at_address(to), at_address(from), bytes);
  }
  void load(Address to, const char* from, i64 bytes, Stream) override {
    const auto lock = begin(&DriverCounters::load);
    std::memcpy(at_address(to), from, bytes);
  }
  void store(char* to, Address from, i64 bytes, Stream) override {
    const auto lock = begin(&DriverCounters::store);
    std::memcpy(to, at_address(from), bytes);
  }
  Event record(Stream) override { return 0; }
  bool done(Event) override { return true; }
  void wait(Event) override {}
  void forget(Event) override {}

 private:
  static constexpr int kHole = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  static int file_of(PageHandle page) { return static_cast<int>(page) - 1; }
  static void* at_address(Address at) { return reinterpret_cast<void*>(at); }
  static void check(bool done, const char* call) {
    if (!done) throw DeviceError(std::string("the dummy driver: ") + std::strerror(errno), call, errno);
  }
  std::unique_lock<ForkMutex> begin(i64 DriverCounters::* counter) {
    std::unique_lock<ForkMutex> lock(mutex_);
    ++(counters_.*counter);
    return lock;
  }

  DriverInfo info_;
  mutable ForkMutex mutex_{"the dummy driver"};
  DriverCounters counters_;
  std::unordered_map<PageHandle, i64> pages_;
  i64 created_bytes_ = 0;
};

}  // namespace

NB_MODULE(dummy_driver, m) {
  m.def("open", []() -> std::shared_ptr<Driver> { return std::make_shared<DummyDriver>(); });
}
