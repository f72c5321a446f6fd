#include "driver/host/host_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <string>

#include "driver/host/host_limits.h"

namespace kvmem {
namespace {

[[noreturn]] void fail(const char* call) {
  const int code = errno;
  throw DeviceError(std::string("the host driver: ") + call + " failed: " + std::strerror(code), call, code);
}

// Growing past RLIMIT_FSIZE would raise SIGXFSZ, which kills the process.
i64 nominal_bytes() {
  constexpr i64 kNominal = i64{1} << 46;
  rlimit limit{};
  if (getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur >= static_cast<rlim_t>(kNominal)) return kNominal;
  return static_cast<i64>(limit.rlim_cur) / sysconf(_SC_PAGESIZE) * sysconf(_SC_PAGESIZE);
}

}  // namespace

HostFile::HostFile(bool holes_fault) : holes_fault_(holes_fault) {
  fd_ = memfd_create("kvmem", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd_ < 0) fail("memfd_create");
  const i64 bytes = nominal_bytes();
  // Sealed against shrinking, because touching a mapping beyond the end of a file is SIGBUS. Punching holes stays
  // allowed.
  if (ftruncate(fd_, bytes) != 0 || fcntl(fd_, F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
    const int code = errno;
    ::close(fd_);
    errno = code;
    fail("ftruncate");
  }
  free_[0] = bytes;
  keep_in_parent(fd_);
  open_window(std::min(bytes, host_total_bytes() / sysconf(_SC_PAGESIZE) * sysconf(_SC_PAGESIZE)));
}

HostFile::~HostFile() {
  // In a forked child nothing is mapped there, and the addresses may be another's by now.
  if (window_ != 0 && !fork_.forked()) munmap(reinterpret_cast<void*>(window_), window_bytes_);
  close_kept(fd_);
}

void HostFile::open_window(i64 bytes) {
  void* window = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
  if (window == MAP_FAILED) return;
  if (madvise(window, bytes, MADV_DONTFORK) != 0) {
    munmap(window, bytes);
    return;
  }
  window_ = reinterpret_cast<Address>(window);
  window_bytes_ = bytes;
}

i64 HostFile::next(i64 bytes) const {
  for (const auto& [offset, free] : free_) {
    if (free >= bytes) return offset;
  }
  throw OutOfMemory("the host driver: no " + std::to_string(bytes) +
                    " adjacent bytes left in its file (RLIMIT_FSIZE is " + "the usual cause: raise `ulimit -f`)");
}

void HostFile::take(i64 offset, i64 bytes) {
  auto piece = free_.extract(offset);
  if ((piece.mapped() -= bytes) == 0) return;
  piece.key() += bytes;
  free_.insert(std::move(piece));
}

void HostFile::give(i64 offset, i64 bytes) {
  // First: it may find no memory, and nothing has changed then.
  const auto it = free_.emplace(offset, bytes).first;
  int result;
  do {
    result = fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes);
  } while (result != 0 && errno == EINTR);
  if (result != 0) {
    const int code = errno;
    free_.erase(it);
    errno = code;
    fail("fallocate");
  }
  auto next = std::next(it);
  if (next != free_.end() && offset + bytes == next->first) {
    it->second += next->second;
    free_.erase(next);
  }
  if (it != free_.begin() && std::prev(it)->first + std::prev(it)->second == offset) {
    std::prev(it)->second += it->second;
    free_.erase(it);
  }
}

void HostFile::show(Address at, i64 bytes, i64 offset, bool accessible) const {
  void* where = reinterpret_cast<void*>(at);
  if (accessible && offset + bytes <= window_bytes_) {
    // An old size of 0 leaves the window as it is and makes a second mapping of the same pages.
    void* source = reinterpret_cast<void*>(window_ + Address(offset));
    if (mremap(source, 0, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, where) == where) return;
    // Not every system has it (valgrind has not), and what else may be wrong the longer way says.
  }
  const int protection = accessible ? PROT_READ | PROT_WRITE : PROT_NONE;
  if (mmap(where, bytes, protection, MAP_SHARED | MAP_FIXED, fd_, offset) == MAP_FAILED) {
    system_failed("map", "mmap", range_text(at, bytes));
  }
  // A shared mapping would stay shared with a forked child, which could then write into the parent's cache.
  if (madvise(where, bytes, MADV_DONTFORK) != 0) {
    const DeviceError cause(range_text(at, bytes) + ": " + std::strerror(errno), "madvise", errno);
    if (!make_hole(at, bytes)) UndoFailed::raise("madvise", cause, DeviceError(std::strerror(errno), "mmap", errno));
    errno = static_cast<int>(cause.code());
    system_failed("map", "madvise", range_text(at, bytes));
  }
}

int HostFile::hole_protection() const {
  // Without access for writing, the kernel shows its one page of zeros to who reads, and charges nobody for it.
  return holes_fault_ ? PROT_NONE : PROT_READ;
}

bool HostFile::make_hole(Address at, i64 bytes) const {
  void* where = reinterpret_cast<void*>(at);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(where, bytes, hole_protection(), flags, -1, 0) == MAP_FAILED) return false;
  madvise(where, bytes, MADV_DONTFORK);  // a new mapping loses the flag; with it the hole merges with its neighbours
  return true;
}

void system_failed(const char* call, const char* system_call, const std::string& what) {
  const int code = errno;
  const std::string message =
      std::string("the host driver: ") + call + " of " + what + ": " + system_call + " failed: " + std::strerror(code);
  if (code == ENOMEM) {
    throw OutOfMemory(message +
                      " (address space, or vm.max_map_count: use a larger page_bytes, fewer rows, or raise it)");
  }
  throw DeviceError(message, call, code);
}

i64 HostFile::physical_bytes() const {
  struct stat status{};
  if (fstat(fd_, &status) != 0) fail("fstat");
  return static_cast<i64>(status.st_blocks) * 512;
}

}  // namespace kvmem
