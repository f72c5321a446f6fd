// The physical memory of the host driver: one sparse memfd, whose ranges are allocated lowest first and mapped at
// addresses.
//
// Thread safety: none for find_free(), allocate() and free(), which the caller serialises; the rest is const.
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

  // Returns the lowest free offset with room for `bytes`, so that pages created one after another are adjacent and can
  // be mapped by one call. Throws OutOfMemory past the end of the file (64 TiB, or RLIMIT_FSIZE).
  i64 find_free(i64 bytes) const;
  // REQUIRES: `offset` is what find_free(bytes) has just returned. Needs no memory.
  void allocate(i64 offset, i64 bytes);
  // Returns the memory of the range to the system, and the range to find_free(). REQUIRES: nothing maps the range.
  void free(i64 offset, i64 bytes);
  // Maps [offset, offset + bytes) of the file at `at`, in place of what is mapped there. Throws DeviceError or
  // OutOfMemory, and leaves a hole then; throws UndoFailed if that fails too.
  void map(Address at, i64 bytes, i64 offset, bool accessible) const;
  // Makes the range a hole: it stays reserved and has no content. munmap() would let mmap() in another thread have the
  // addresses. Returns false with errno, and has changed nothing, where the kernel has no mapping left for the hole.
  bool unmap(Address at, i64 bytes) const;
  // Returns the protection of holes, which is the same for all, so that the kernel merges neighbours.
  int hole_protection() const;
  bool forked() const { return fork_.forked(); }
  // Returns how many bytes the system has allocated for the file.
  i64 physical_bytes() const;

 private:
  void open_window(i64 bytes);

  const ForkGuard fork_;
  const bool holes_fault_;
  int fd_ = -1;
  // An accessible mapping of the start of the file, as long as the machine has memory; 0 if there are no addresses for
  // it. mremap() duplicates a part of it together with access and MADV_DONTFORK, which otherwise takes two or three
  // system calls.
  Address window_ = 0;
  i64 window_bytes_ = 0;
  std::map<i64, i64> free_;  // the free ranges: offset -> bytes; no two are adjacent
};

// Throws the error for errno after `system_call` failed in `call`: OutOfMemory for ENOMEM, else DeviceError.
[[noreturn]] void system_failed(const char* call, const char* system_call, const std::string& what);

}  // namespace kvmem
