// The verbs a device must allow_eviction: the only door to memory. Each kind of device implements them in a folder of
// its own (host/, cuda/), CheckedDriver wraps any of them, and nothing above knows which one it holds: what differs
// between devices and matters above is data in DriverInfo.
//
// The contract, the same for every driver:
//   1. Sizes and addresses of pages, mappings and reservations are multiples of info().granularity_bytes. zero() and
//      copy() take any.
//   2. A page is mapped whole, at offset 0, and each mapping is unmapped whole.
//   3. A range must be reserved and free of mappings before map(); it may be touched only after set_access().
//   4. One page may be mapped at several addresses. A page is destroyed only when nothing maps it, and a reservation is
//      released only when nothing is mapped in it.
//   5. unmap() does not wait for work in flight: the caller waits for the event of the last user first.
//   6. A call that fails has changed nothing. It throws OutOfMemory where the device is short of something, else
//      DeviceError. Misuse that the device would leave undefined is a DeviceError too.
//   7. A run verb that fails takes back what it has done. If that fails too it throws HalfDone, and nobody may use the
//      range again but to unmap it.
//   8. Between undoing(true) and undoing(false) the calling code takes back what it has done before. A driver may draw
//      on what it keeps in reserve for that.
//   9. Contents, events and streams are ordered as CUDA's are. A driver without streams has done everything when a call
//      returns, and its only event is 0.
//  10. Calls may come from any thread. A driver made before fork() throws DeviceError in the child (fork_guard.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "base/types.h"

namespace kvmem {

using PageHandle = std::uint64_t;  // one physical page; 0 is never a page
using Address = std::uintptr_t;
using Stream = std::uintptr_t;  // the driver's stream handle; 0 is the default stream
using Event = std::uint64_t;    // 0 is an event that has already completed

// A call failed, and taking back what it had done failed too: it is not known what is mapped (rule 7). `call` and
// `code` are those of the failure while taking back, where it has any.
class HalfDone : public DeviceError {
 public:
  // Throws one; without text where there is no memory for it.
  [[noreturn]] static void raise(const std::string& doing, const std::exception& cause, const std::exception& undo);

 private:
  using DeviceError::DeviceError;
};

struct DriverInfo {
  std::string name;            // "host", "cuda", ...
  int dlpack_device_type = 1;  // kDLCPU = 1, kDLCUDA = 2
  int device_index = 0;
  i64 granularity_bytes = 0;  // every size and address is a multiple of this
  i64 recommended_bytes = 0;  // the page size the driver itself would choose
  i64 total_bytes = 0;        // physical memory of the device
  bool fresh_pages_are_zero = false;
  bool shareable = false;  // pages can be exported as file descriptors
  bool rdma = false;       // pages may be registered with an RDMA adapter

  // Traits: what a pool and an allocator do differently on this kind of device.
  bool creates_ahead = false;     // create() is slow: a pool creates its whole budget when it is made
  bool maps_cheaply = false;      // a mapping costs little: pages need not be larger to save calls
  bool tells_free_bytes = false;  // create() can get what available_bytes() says; else memory comes at first touch
  bool has_streams = false;       // work may go on after a call has returned
  i64 captured_code = 0;          // DeviceError::code() where a stream is being captured into a graph; 0: never
  i64 most_pages = 0;             // the default page size keeps a pool below so many pages; 0: any number
  i64 default_guard_tokens = 0;   // how far kernels of this device may load past a sequence's length
  i64 default_ahead_tokens = 0;   // how far ahead of a sequence's growth a pool maps
};

// What create() makes. Both cost nothing where the device supports them; some devices want coarser pages for them.
struct PageOptions {
  bool shareable = false;
  bool rdma = false;
};

// How often each verb was called (successfully or not), and what is held now.
struct DriverCounters {
  i64 reserve = 0, release = 0, create = 0, destroy = 0, map = 0, set_access = 0, unmap = 0;
  i64 zero = 0, copy = 0, record = 0, wait = 0;
  i64 total() const { return reserve + release + create + destroy + map + set_access + unmap; }
};

class Driver {
 public:
  virtual ~Driver() = default;
  virtual const DriverInfo& info() const = 0;
  virtual DriverCounters counters() const = 0;
  // Physical bytes the system says this driver holds now: what the memfd really contains, or pages created.
  virtual i64 physical_bytes() const = 0;
  // Bytes that could still be created, as far as the system tells.
  virtual i64 available_bytes() const = 0;

  // Address space. `alignment` is a power of two or 0. Costs no memory.
  virtual Address reserve(i64 bytes, i64 alignment) = 0;
  virtual void release(Address base, i64 bytes) = 0;  // exactly what reserve returned, nothing mapped in it

  // Physical pages.
  virtual PageHandle create(i64 bytes) = 0;
  virtual void destroy(PageHandle page) = 0;

  // Mappings. `bytes` is the size the page was created with, `offset` is 0.
  virtual void map(Address at, i64 bytes, i64 offset, PageHandle page) = 0;
  virtual void set_access(Address at, i64 bytes) = 0;  // read and write; the whole range must be mapped
  virtual void unmap(Address at, i64 bytes) = 0;       // exactly one mapping

  // A run of pages of `page_bytes` each, mapped back to back from `at`, and the reverse. All or nothing (rule 7). The
  // base class calls the verbs above once a page; a driver that can do better overrides (host: one mmap per adjacent
  // run; CUDA: one cuMemUnmap for a run, where the driver takes that).
  // map_run does not call set_access.
  virtual void map_run(Address at, i64 page_bytes, const PageHandle* pages, i64 count);
  // map_run, and where that takes no further call set_access too: true then.
  virtual bool map_run_open(Address at, i64 page_bytes, const PageHandle* pages, i64 count) {
    map_run(at, page_bytes, pages, count);
    return false;
  }
  // On the host, unmapping in the middle of a run splits a mapping of the kernel's; where that would use up
  // vm.max_map_count, unmap and unmap_run throw OutOfMemory.
  virtual void unmap_run(Address at, i64 page_bytes, i64 count);

  // Contents, ordered on `stream`. Every range must be mapped by this driver and accessible. A copy must not overlap
  // itself.
  virtual void zero(Address at, i64 bytes, Stream stream) = 0;
  virtual void copy(Address to, Address from, i64 bytes, Stream stream) = 0;

  // Fences. record() marks what has been put on `stream` so far; wait() blocks the calling thread until it is done.
  virtual Event record(Stream stream) = 0;
  virtual bool done(Event event) = 0;
  virtual void wait(Event event) = 0;
  virtual void forget(Event event) = 0;  // gives the event back; done() need not be true

  // Streams. A driver whose work is done when a call returns has one stream only, and nothing to order.
  virtual void check_stream(Stream) const {}  // DeviceError where it is of another device or context
  // A stream of the driver's own: nothing put on it waits for the streams that kernels use.
  virtual Stream side_stream() { return 0; }
  // What is put on `later` from now on starts after `event`. The calling thread does not wait.
  virtual void order(Event /*event*/, Stream /*later*/) {}
  // Blocks until everything on every stream is done. For ends only: a step must wait for nobody else's work.
  virtual void wait_for_device() {}

  virtual void undoing(bool /*begin*/) {}  // rule 8

 protected:
  // What the base unmap_run needs to know to put a page back when a later call of the same run fails.
  struct Mapped {
    PageHandle page = 0;  // 0: unknown, cannot be put back
    bool accessible = false;
  };
  virtual Mapped mapped_at(Address) const { return {}; }
};

// While it lives, the calls to the driver take back what was done (rule 8).
class Undoing {
 public:
  explicit Undoing(Driver& driver) : driver_(driver) { driver_.undoing(true); }
  ~Undoing() { driver_.undoing(false); }
  Undoing(const Undoing&) = delete;
  Undoing& operator=(const Undoing&) = delete;

 private:
  Driver& driver_;
};

// "[0x7f0000000000, +65536)": an address range in a message.
std::string range_text(Address at, i64 bytes);

// memfd + mmap: the CPU device. Real memory, really mapped on demand. Where nothing is mapped, reading gives zeros and
// writing faults; with `holes_fault`, and in a debug build, reading faults too, as on a GPU.
std::shared_ptr<Driver> make_host_driver(bool holes_fault = false);

// libcuda opened at run time. `library` is a path, "" for KVMEM_CUDA_DRIVER or else libcuda.so.1. DeviceError where
// there is none, the device does not exist, or it has no virtual memory management or not what `pages` asks for.
std::shared_ptr<Driver> make_cuda_driver(int device_index, const std::string& library, PageOptions pages = {});

}  // namespace kvmem
