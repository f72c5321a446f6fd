// csrc/memory/space.* by itself, for tests/driver/test_space_runs.py: one arena on the checked host driver, all of it
// mapped, and lists of records that no rule of an allocator or a replica stands before.

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "driver/checked_driver.h"
#include "memory/space.h"

using namespace kvmem;

namespace {

struct Executor {
  std::shared_ptr<CheckedDriver> driver;
  std::unique_ptr<Space> space;
  std::string error;
};

}  // namespace

extern "C" {

Executor* space_open(i64 page_bytes, i64 pages) {
  auto driver = std::make_shared<CheckedDriver>(make_host_driver());
  auto space = std::make_unique<Space>(driver, page_bytes);
  space->add_arena(0, pages);
  const Op ops[] = {{OpKind::create, 0, 0, pages}, {OpKind::map, 0, 0, 0, pages}};
  space->execute(ops, ops + 2);
  return new Executor{std::move(driver), std::move(space), {}};
}

void space_close(Executor* executor) { delete executor; }

void* space_memory(Executor* executor) { return reinterpret_cast<void*>(executor->space->arena_base(0)); }

// `records`: six numbers each. Returns what was thrown, "" for nothing.
const char* space_execute(Executor* executor, const i64* records, i64 count) {
  std::vector<Op> ops;
  for (const i64* r = records; r < records + 6 * count; r += 6) {
    ops.push_back({static_cast<OpKind>(r[0]), static_cast<i32>(r[1]), r[2], r[3], r[4], r[5]});
  }
  executor->error.clear();
  try {
    executor->space->execute(ops.data(), ops.data() + ops.size());
  } catch (const std::exception& e) {
    executor->error = e.what();
  }
  return executor->error.c_str();
}

i64 space_calls(Executor* executor, const char* verb) {
  const DriverCounters made = executor->driver->counters();
  return std::strcmp(verb, "zero") == 0 ? made.zero : made.copy;
}

}  // extern "C"
