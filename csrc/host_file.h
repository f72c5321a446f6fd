// One sparse memfd: the physical memory of the host driver. Hands out offsets, lowest first, and punches holes.
#pragma once

#include <map>

#include "types.h"

namespace kvmem {

class HostFile {
 public:
  HostFile();
  ~HostFile();
  HostFile(const HostFile&) = delete;
  HostFile& operator=(const HostFile&) = delete;

  int fd() const { return fd_; }
  // The lowest free offset with room for `bytes`, so that pages created in a row are adjacent and map as one.
  // OutOfMemory only past the file's nominal end (64 TiB, or RLIMIT_FSIZE).
  i64 take(i64 bytes);
  // Gives the memory behind the range back to the system, then the range. Whatever maps it would read zeros.
  void give(i64 offset, i64 bytes);
  // What the file really holds, by fstat.
  i64 physical_bytes() const;

 private:
  int fd_ = -1;
  std::map<i64, i64> free_;  // offset -> bytes, never adjacent
};

}  // namespace kvmem
