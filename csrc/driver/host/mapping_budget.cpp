#include "mapping_budget.h"

#include <atomic>
#include <string>

#include "host_memory.h"

namespace kvmem {
namespace {
std::atomic<i64> held{0};
}  // namespace

MappingBudget::MappingBudget() : limit_(host_max_mappings()) {}

void MappingBudget::add(i64 change) { held += change; }

void MappingBudget::check(i64 more, i64 percent) const {
  const i64 budget = limit_ / 100 * percent, now = held.load();
  if (more <= 0 || now + more <= budget) return;
  throw OutOfMemory("the host driver: " + std::to_string(now) + " kernel mappings are held and " +
                    std::to_string(more) + " more would pass " + std::to_string(budget) + ", " +
                    std::to_string(percent) + " % of vm.max_map_count = " + std::to_string(limit_) +
                    ". Free sequences, use a larger page_bytes or fewer rows, or raise `sysctl vm.max_map_count`");
}

}  // namespace kvmem
