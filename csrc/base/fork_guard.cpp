#include "base/fork_guard.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

#include "base/check.h"

namespace kvmem {
namespace {

// Never destroyed, because Python may destroy drivers after the static objects of this file.
struct Descriptors {
  std::mutex mutex;
  std::vector<int> open;
};
Descriptors& descriptors() {
  static Descriptors* all = new Descriptors;
  return *all;
}

// The lock is held across fork(), so that the child never sees a half-changed list.
void before_fork() { descriptors().mutex.lock(); }
void after_fork_in_parent() { descriptors().mutex.unlock(); }
void after_fork_in_child() {
  forks.fetch_add(1, std::memory_order_relaxed);
  for (int fd : descriptors().open) ::close(fd);
  descriptors().open.clear();
  descriptors().mutex.unlock();
}

void watch_forks() {
  static const int failed = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  if (failed)
    throw DeviceError("pthread_atfork failed: a forked child could not be detected", "pthread_atfork", failed);
}

}  // namespace

ForkGuard::ForkGuard() : generation_((watch_forks(), forks.load(std::memory_order_relaxed))) {}

void ForkGuard::refuse(const char* what) {
  throw DeviceError(std::string(what) +
                        " was made before fork() and belongs to the parent process; make a new one here, " +
                        "or start workers with the 'spawn' method",
                    "fork");
}

void keep_in_parent(int fd) {
  KVMEM_ASSERT(fd >= 0, "the descriptor is open");
  watch_forks();
  std::lock_guard<std::mutex> lock(descriptors().mutex);
  descriptors().open.push_back(fd);
}

void close_kept(int fd) {
  std::lock_guard<std::mutex> lock(descriptors().mutex);
  auto& open = descriptors().open;
  auto found = std::find(open.begin(), open.end(), fd);
  if (found == open.end()) return;
  open.erase(found);
  ::close(fd);
}

}  // namespace kvmem
