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

#include "base/check.h"
#include "driver/host/host_limits.h"

namespace kvmem {
namespace {

[[noreturn]] void fail(const char* call, int code = errno) {
  throw DeviceError(std::string("the host driver: ") + call + " failed: " + std::strerror(code), call, code);
}

// Returns the length of the file, which takes no memory: 64 TiB, or RLIMIT_FSIZE, beyond which SIGXFSZ would kill the
// process.
i64 file_bytes() {
  constexpr i64 kMost = i64{1} << 46;
  rlimit limit{};
  if (getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur >= static_cast<rlim_t>(kMost)) return kMost;
  return static_cast<i64>(limit.rlim_cur) / sysconf(_SC_PAGESIZE) * sysconf(_SC_PAGESIZE);
}

}  // namespace

HostFile::HostFile(bool holes_fault) : holes_fault_(holes_fault) {
  fd_ = memfd_create("kvmem", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd_ < 0) fail("memfd_create");
  const i64 bytes = file_bytes();
  // The seal forbids shrinking the file, since an access beyond its end raises SIGBUS. Punching holes stays allowed.
  if (ftruncate(fd_, bytes) != 0 || fcntl(fd_, F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
    const int code = errno;
    ::close(fd_);
    fail("ftruncate", code);
  }
  free_[0] = bytes;
  keep_in_parent(fd_);
  open_window(std::min(bytes, host_total_bytes() / sysconf(_SC_PAGESIZE) * sysconf(_SC_PAGESIZE)));
}

HostFile::~HostFile() {
  // A forked child has no mapping there, and may use the addresses for something else.
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

i64 HostFile::find_free(i64 bytes) const {
  for (const auto& [offset, free] : free_) {
    if (free >= bytes) return offset;
  }
  throw OutOfMemory("the host driver: its file has no " + std::to_string(bytes) +
                    " adjacent bytes left (RLIMIT_FSIZE is the usual cause: raise `ulimit -f`)");
}

void HostFile::allocate(i64 offset, i64 bytes) {
  auto range = free_.extract(offset);
  KVMEM_ASSERT(!range.empty() && range.mapped() >= bytes, "find_free() returned the offset");
  if ((range.mapped() -= bytes) == 0) return;
  range.key() += bytes;
  free_.insert(std::move(range));
}

void HostFile::free(i64 offset, i64 bytes) {
  const auto [it, inserted] = free_.emplace(offset, bytes);  // may throw bad_alloc, so it precedes every change
  KVMEM_ASSERT(inserted, "the range was allocated");
  int result;
  do {
    result = fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes);
  } while (result != 0 && errno == EINTR);
  if (result != 0) {
    const int code = errno;
    free_.erase(it);
    fail("fallocate", code);
  }
  const auto next = std::next(it);
  KVMEM_ASSERT(next == free_.end() || offset + bytes <= next->first, "the range was allocated");
  if (next != free_.end() && offset + bytes == next->first) {
    it->second += next->second;
    free_.erase(next);
  }
  if (it != free_.begin() && std::prev(it)->first + std::prev(it)->second == offset) {
    std::prev(it)->second += it->second;
    free_.erase(it);
  }
}

void HostFile::map(Address at, i64 bytes, i64 offset, bool accessible) const {
  void* where = reinterpret_cast<void*>(at);
  if (accessible && offset + bytes <= window_bytes_) {
    // With an old size of 0, mremap() leaves the window unchanged and makes a second mapping of the same pages.
    void* source = reinterpret_cast<void*>(window_ + Address(offset));
    if (mremap(source, 0, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, where) == where) return;
    // Not every system supports this (valgrind does not). After any other error, the calls below report it.
  }
  const int protection = accessible ? PROT_READ | PROT_WRITE : PROT_NONE;
  if (mmap(where, bytes, protection, MAP_SHARED | MAP_FIXED, fd_, offset) == MAP_FAILED) {
    system_failed("map", "mmap", range_text(at, bytes));
  }
  // Otherwise a forked child would share the mapping, and could write into the parent's cache.
  if (madvise(where, bytes, MADV_DONTFORK) != 0) {
    const DeviceError cause(range_text(at, bytes) + ": " + std::strerror(errno), "madvise", errno);
    if (!unmap(at, bytes)) UndoFailed::raise("madvise", cause, DeviceError(std::strerror(errno), "mmap", errno));
    errno = static_cast<int>(cause.code());
    system_failed("map", "madvise", range_text(at, bytes));
  }
}

int HostFile::hole_protection() const {
  // On reads of a hole the kernel maps its one page of zeros, which takes no memory.
  return holes_fault_ ? PROT_NONE : PROT_READ;
}

bool HostFile::unmap(Address at, i64 bytes) const {
  void* where = reinterpret_cast<void*>(at);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(where, bytes, hole_protection(), flags, -1, 0) == MAP_FAILED) return false;
  madvise(where, bytes, MADV_DONTFORK);  // with the same flags as its neighbours, the hole merges with them
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
