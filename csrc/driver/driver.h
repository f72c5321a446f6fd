// The verbs a device must offer: the only door to memory. Three implementations (driver_host.cpp, driver_cuda.cpp)
// and one wrapper (driver_checked.cpp) satisfy this one table; nothing above it knows which one it holds.
//
// Rules, the same for every driver (they are CUDA's, see the VMM section of the driver API):
//   1. A page handle is mapped whole, at offset 0, and unmapped whole.
//   2. A range must be reserved and free of mappings before map; it may be touched only after set_access.
//   3. One page may be mapped at several addresses. A page is destroyed only when nothing maps it.
//   4. unmap does not wait for work in flight: the caller waits for the event of the last user first.
//   5. Every call that fails throws and has changed nothing. OutOfMemory where the driver says so, else DeviceError.
// Sizes and addresses of pages, mappings and reservations are multiples of info().granularity_bytes; zero and copy take
// any. Calls may come from any thread. A driver made before fork() throws DeviceError in the child (see fork_guard.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/types.h"

namespace kvmem {

using PageHandle = std::uint64_t;  // one physical page; 0 is never a page
using Address = std::uintptr_t;
using Stream = std::uintptr_t;  // the driver's stream handle; 0 is the default stream
using Event = std::uint64_t;    // 0 is an event that has already completed

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

  // A run of pages of `page_bytes` each, mapped back to back from `at`, and the reverse. All or nothing. The base
  // class calls the verbs above once a page; a driver that can do better overrides (host: one mmap per adjacent run;
  // CUDA: one cuMemUnmap for a run, where the driver takes that).
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

 protected:
  // What the base unmap_run needs to know to put a page back when a later call of the same run fails.
  struct Mapped {
    PageHandle page = 0;  // 0: unknown, cannot be put back
    bool accessible = false;
  };
  virtual Mapped mapped_at(Address) const { return {}; }
  // Brackets the calls by which the base run verbs undo themselves.
  virtual void undoing(bool /*begin*/) {}
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
