#include "driver/host/host_limits.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>

#include "base/check.h"

namespace kvmem {
namespace {

constexpr i64 kUnlimited = std::numeric_limits<i64>::max();

// Returns the number in a one-line file, or `fallback` where the file is absent or says "max".
i64 read_number(const std::string& path, i64 fallback) {
  std::ifstream file(path);
  i64 value = 0;
  return file >> value ? value : fallback;
}

i64 meminfo_bytes(const std::string& field) {
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, field.size(), field) == 0) return std::stoll(line.substr(field.size())) * 1024;
  }
  return 0;
}

// Returns the directory of this process's memory controller, or "" if there is none. `unified` tells version 2 (true)
// from version 1.
std::string cgroup_directory(bool* unified) {
  std::ifstream file("/proc/self/cgroup");
  std::string found;
  for (std::string line; std::getline(file, line);) {
    std::istringstream parts(line);
    std::string id, controllers, path;
    std::getline(parts, id, ':');
    std::getline(parts, controllers, ':');
    std::getline(parts, path);
    if (controllers.empty() && found.empty()) {
      *unified = true;
      found = "/sys/fs/cgroup" + path;
    } else if (controllers == "memory") {
      *unified = false;
      return "/sys/fs/cgroup/memory" + path;
    }
  }
  return found;
}

struct CgroupRoom {
  i64 limit_bytes = kUnlimited;
  i64 left_bytes = kUnlimited;
};

// Returns the lowest limit of the cgroup and its ancestors. Inside a container the path may not exist below the mount;
// the walk still ends at the mount's root, which is the container's own group.
CgroupRoom cgroup_room() {
  bool unified = false;
  std::string directory = cgroup_directory(&unified);
  const std::string root = unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
  const char* limit_name = unified ? "/memory.max" : "/memory.limit_in_bytes";
  const char* used_name = unified ? "/memory.current" : "/memory.usage_in_bytes";
  CgroupRoom room;
  while (directory.size() >= root.size()) {
    const i64 limit = read_number(directory + limit_name, kUnlimited);
    if (limit != kUnlimited) {
      room.limit_bytes = std::min(room.limit_bytes, limit);
      room.left_bytes = std::min(room.left_bytes, limit - read_number(directory + used_name, 0));
    }
    directory.resize(directory.rfind('/'));
  }
  return room;
}

std::atomic<i64> held{0};  // the mappings of all budgets of the process

}  // namespace

i64 host_total_bytes() {
  const i64 physical = static_cast<i64>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  return std::min(physical, cgroup_room().limit_bytes);
}

i64 host_available_bytes() {
  return std::max<i64>(0, std::min(meminfo_bytes("MemAvailable:"), cgroup_room().left_bytes));
}

i64 host_max_mappings() { return read_number("/proc/sys/vm/max_map_count", 65530); }

MappingBudget::MappingBudget() : limit_(host_max_mappings()) {}

void MappingBudget::add(i64 change) {
  [[maybe_unused]] const i64 before = held.fetch_add(change);
  KVMEM_ASSERT(before + change >= 0, "no more mappings are removed than were added");
}

void MappingBudget::check(i64 more, i64 percent) const {
  const i64 most = limit_ / 100 * percent, now = held.load();
  if (more <= 0 || now + more <= most) return;
  throw OutOfMemory("the host driver: " + std::to_string(now) + " kernel mappings are held and " +
                    std::to_string(more) + " more would exceed " + std::to_string(most) + ", " +
                    std::to_string(percent) + " % of vm.max_map_count = " + std::to_string(limit_) +
                    ". Free sequences, use a larger page_bytes or fewer rows, or raise `sysctl vm.max_map_count`");
}

}  // namespace kvmem
