// One sparse memfd: the physical memory of the host driver. Hands out offsets, lowest first, punches holes, and shows
// ranges of itself at addresses.
#pragma once

#include <map>
#include <string>

#include "base/fork_guard.h"
#include "driver/driver.h"

namespace kvmem {

class HostFile {
 public:
  explicit HostFile(bool holes_fault);
  ~HostFile();
  HostFile(const HostFile&) = delete;
  HostFile& operator=(const HostFile&) = delete;

  // The lowest free offset with room for `bytes`, so that pages created in a row are adjacent and map as one.
  // OutOfMemory only past the file's nominal end (64 TiB, or RLIMIT_FSIZE).
  i64 next(i64 bytes) const;
  // Takes what next() has just answered. Cannot fail.
  void take(i64 offset, i64 bytes);
  // Gives the memory behind the range back to the system, then the range. Whatever maps it would read zeros.
  void give(i64 offset, i64 bytes);
  // Shows [offset, offset + bytes) of the file at `at`, in place of what is there. DeviceError or OutOfMemory, and then
  // there is a hole.
  void show(Address at, i64 bytes, i64 offset, bool accessible) const;
  // A hole: addresses that stay ours and hold nothing. A munmap would let another thread's mmap have them. False, with
  // errno, and nothing changed, where the kernel has no mapping left for it.
  bool make_hole(Address at, i64 bytes) const;
  // What a hole is mapped with. All have the same, so that neighbours are one mapping of the kernel's.
  int hole_protection() const;
  // What the file really holds, by fstat.
  i64 physical_bytes() const;

 private:
  void open_window(i64 bytes);

  const ForkGuard fork_;
  const bool holes_fault_;
  int fd_ = -1;
  // The start of the file, as many bytes as there is memory, mapped with access where nobody knows of it; 0 where there
  // are no addresses for that. A part of it shown elsewhere by mremap brings access and MADV_DONTFORK with it: one call
  // of the system's instead of two or three.
  Address window_ = 0;
  i64 window_bytes_ = 0;
  std::map<i64, i64> free_;  // offset -> bytes, never adjacent
};

// errno of a failed system call, as the right error. Where memory or mappings ran out nothing is broken: OutOfMemory.
[[noreturn]] void system_failed(const char* call, const char* system_call, const std::string& what);

}  // namespace kvmem
