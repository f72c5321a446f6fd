// The interface of a device: its address space, physical pages, mappings, contents and events. No other interface gives
// access to memory. Each kind of device implements it in a folder of its own (host/, cuda/), and CheckedDriver wraps
// any of them. What differs between devices and matters to a caller is data in DriverInfo.
//
// The rules, the same for every driver:
//   1. Sizes and addresses of pages, mappings and reservations are multiples of info().granularity_bytes. zero() and
//      copy() take any.
//   2. A page is mapped whole, at offset 0, and each mapping is unmapped whole.
//   3. map() needs a range that is reserved and has no mapping. The range may be used only after set_access().
//   4. One page may be mapped at several addresses. A page is destroyed only when nothing maps it, and a reservation is
//      released only when nothing is mapped in it.
//   5. unmap() does not wait for work in flight: the caller first waits for the event of the last user.
//   6. A call that fails has changed nothing. It throws OutOfMemory where the device lacks a resource, else
//      DeviceError. Misuse that the device leaves undefined is a DeviceError too.
//   7. map_run() and unmap_run() undo what they have done when they fail. If the undo fails too they throw UndoFailed,
//      and the range may only be unmapped from then on.
//   8. Between undoing(true) and undoing(false) the caller undoes earlier calls. A driver may use resources for these
//      calls that it withholds from others.
//   9. Contents, events and streams are ordered as CUDA's are. A driver without streams has done all work when a call
//      returns, and its only event is 0.
//  10. Every function may be called from any thread. After fork(), a driver of the parent throws DeviceError in the
//      child (base/fork_guard.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "base/types.h"

namespace kvmem {

using PageHandle = std::uint64_t;  // one physical page; 0 is no page
using Address = std::uintptr_t;
using Stream = std::uintptr_t;  // the device's stream handle; 0 is the default stream
using Event = std::uint64_t;    // 0 is an event that has completed

// A call failed and its undo failed too, so it is not known what is mapped (rule 7). call() and code() are those of the
// error during the undo.
class UndoFailed : public DeviceError {
 public:
  // Throws an UndoFailed: `doing` failed with `cause`, and its undo with `undo`. The message is empty where there is no
  // memory for it.
  [[noreturn]] static void raise(const std::string& doing, const std::exception& cause, const std::exception& undo);

 private:
  using DeviceError::DeviceError;
};

struct DriverInfo {
  std::string name;            // "host", "cuda", ...
  int dlpack_device_type = 1;  // kDLCPU = 1, kDLCUDA = 2
  int device_index = 0;
  i64 granularity_bytes = 0;  // rule 1
  i64 recommended_bytes = 0;  // the page size that the device recommends
  i64 total_bytes = 0;        // physical memory of the device
  bool fresh_pages_are_zero = false;
  bool shareable = false;  // pages can be exported as file descriptors
  bool rdma = false;       // pages may be registered with an RDMA adapter

  // How a pool and an allocator behave on this kind of device.
  bool creates_ahead = false;     // create() is slow: a pool creates its whole budget when it is made
  bool maps_cheaply = false;      // a mapping costs little: larger pages would save nothing
  bool tells_free_bytes = false;  // create() can get what available_bytes() says; else memory is taken at first touch
  bool has_streams = false;       // work may continue after a call has returned
  i64 captured_code = 0;          // DeviceError::code() where a stream is being captured into a graph; 0: never
  i64 most_pages = 0;             // the default page size keeps a pool below this number of pages; 0: any number
  i64 default_guard_tokens = 0;   // how far kernels of this device may load past a sequence's length
  i64 default_ahead_tokens = 0;   // how far ahead of a sequence's growth a pool maps
};

// Properties of the pages that create() makes. Some devices need coarser pages for them.
struct PageOptions {
  bool shareable = false;
  bool rdma = false;
};

// How often each function was called, whether it succeeded or not.
struct DriverCounters {
  i64 reserve = 0, release = 0, create = 0, destroy = 0, map = 0, set_access = 0, unmap = 0;
  i64 zero = 0, copy = 0, load = 0, store = 0, record = 0, wait = 0;
  i64 total() const { return reserve + release + create + destroy + map + set_access + unmap; }
};

class Driver {
 public:
  virtual ~Driver() = default;
  virtual const DriverInfo& info() const = 0;
  virtual DriverCounters counters() const = 0;
  // Returns the physical bytes that this driver holds now, as the system counts them.
  virtual i64 physical_bytes() const = 0;
  // Returns how many bytes could still be created, as far as the system can tell.
  virtual i64 available_bytes() const = 0;

  // --- address space ---
  // Returns the start of a new range. `alignment` is a power of two or 0. Takes no physical memory.
  virtual Address reserve(i64 bytes, i64 alignment) = 0;
  // REQUIRES: the arguments are those of one reserve(), and nothing is mapped in the range.
  virtual void release(Address base, i64 bytes) = 0;

  // --- physical pages ---
  virtual PageHandle create(i64 bytes) = 0;
  virtual void destroy(PageHandle page) = 0;

  // --- mappings ---
  // REQUIRES: `bytes` is the size of the page, and `offset` is 0.
  virtual void map(Address at, i64 bytes, i64 offset, PageHandle page) = 0;
  // Allows reading and writing. REQUIRES: the range consists of whole mappings.
  virtual void set_access(Address at, i64 bytes) = 0;
  // REQUIRES: the range is exactly one mapping. On the host it throws OutOfMemory where the split of a kernel mapping
  // would exceed vm.max_map_count; so does unmap_run().
  virtual void unmap(Address at, i64 bytes) = 0;
  // Maps `count` pages of `page_bytes` each, adjacent from `at` on: all or none (rule 7). Does not call set_access().
  // The base class calls map() for each page.
  virtual void map_run(Address at, i64 page_bytes, const PageHandle* pages, i64 count);
  // Like map_run(). Returns true if the pages are accessible too, where that takes no further call.
  virtual bool map_run_open(Address at, i64 page_bytes, const PageHandle* pages, i64 count) {
    map_run(at, page_bytes, pages, count);
    return false;
  }
  // Unmaps `count` adjacent mappings of `page_bytes` each: all or none (rule 7). The base class calls unmap() for each.
  virtual void unmap_run(Address at, i64 page_bytes, i64 count);

  // --- contents, ordered on `stream` ---
  // REQUIRES: the ranges are mapped by this driver and accessible, and those of a copy do not overlap.
  virtual void zero(Address at, i64 bytes, Stream stream) = 0;
  virtual void copy(Address to, Address from, i64 bytes, Stream stream) = 0;
  // Copy from and to memory of the host, which must stay until the work is done.
  virtual void load(Address to, const char* from, i64 bytes, Stream stream) = 0;
  virtual void store(char* to, Address from, i64 bytes, Stream stream) = 0;

  // --- events ---
  // Returns an event that completes when the work put on `stream` so far is done. Each is released by forget().
  virtual Event record(Stream stream) = 0;
  virtual bool done(Event event) = 0;
  virtual void wait(Event event) = 0;    // blocks the calling thread
  virtual void forget(Event event) = 0;  // releases the event, done or not

  // --- streams; a driver without streams inherits these ---
  // Throws DeviceError for a stream of another device or context.
  virtual void check_stream(Stream) const {}
  // Returns a stream of the driver's own, whose work does not wait for the streams of kernels.
  virtual Stream side_stream() { return 0; }
  // Makes the device start what is put on `later` from now on after `event`. The calling thread does not wait.
  virtual void order(Event /*event*/, Stream /*later*/) {}
  // Blocks until the device has done everything. Only for the end of an owner: a step must not wait for others' work.
  virtual void wait_for_device() {}

  virtual void undoing(bool /*begin*/) {}  // rule 8; calls may nest

 protected:
  // What is mapped at an address; the base unmap_run() needs it to map a page again.
  struct Mapped {
    PageHandle page = 0;  // 0: unknown, so it cannot be mapped again
    bool accessible = false;
  };
  virtual Mapped mapped_at(Address) const { return {}; }
};

// Calls undo() because `doing` failed with `cause`, and marks the calls as undoing (rule 8). Throws UndoFailed if
// undo() throws.
template <class Undo>
void undo_call(Driver& driver, const char* doing, const std::exception& cause, Undo undo) {
  struct Mark {
    explicit Mark(Driver& d) : driver(d) { driver.undoing(true); }
    ~Mark() { driver.undoing(false); }
    Driver& driver;
  };
  const Mark mark(driver);
  try {
    undo();
  } catch (const std::exception& e) {
    UndoFailed::raise(doing, cause, e);
  }
}

// Returns an address range for a message: "[0x7f0000000000, +65536)".
std::string range_text(Address at, i64 bytes);

// Returns the CPU device: real memory, mapped with memfd and mmap. Where nothing is mapped, reading gives zeros and
// writing faults; with `holes_fault`, and in debug builds, reading faults too, as on a GPU.
std::shared_ptr<Driver> make_host_driver(bool holes_fault = false);

// Returns a CUDA device. libcuda is opened at run time: `library` is a path, "" stands for $KVMEM_CUDA_DRIVER or
// libcuda.so.1. Throws DeviceError where the library or the device does not exist, or where the device has no virtual
// memory management, or no pages with these options.
std::shared_ptr<Driver> make_cuda_driver(int device_index, const std::string& library, PageOptions pages = {});

}  // namespace kvmem
