// The cost of mapping a run of pages on the CPU, without Python: a bare mmap of a memfd, the host driver's call, and
// Allocator::extend, which also decides, updates metadata and can be undone. They take turns, so that a slow moment of
// the machine affects all three. The pages exist before the clock starts, and none is touched.

#include <sys/mman.h>
#include <unistd.h>

#include "allocator/allocator.h"
#include "workload.h"

namespace kvmem_bench {
namespace {

using namespace kvmem;

constexpr i64 kAreas = 8, kRuns = 12, kBlock = 16;  // sequences that grow in turn, and runs of each

struct Bare {
  explicit Bare(i64 bytes) : bytes(bytes), file(memfd_create("bench", 0)) {
    base = static_cast<char*>(mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base == MAP_FAILED || file < 0 || ftruncate(file, bytes) != 0) throw Error("no addresses or no memfd");
  }
  ~Bare() { munmap(base, bytes), close(file); }
  Bare(const Bare&) = delete;
  Bare& operator=(const Bare&) = delete;
  void map(i64 at, i64 size, i64 offset) const {
    if (mmap(base + at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, offset) == MAP_FAILED) {
      throw Error("mmap failed");
    }
  }
  i64 bytes;
  int file;
  char* base;
};

// A block is a page, one arena, no prefix cache.
Geometry geometry_of(i64 page_bytes, i64 run) {
  GroupGeometry group;
  group.block_tokens = kBlock;
  group.max_tokens = group.row_tokens = kRuns * run * kBlock;
  group.max_blocks = (1 + kAreas) * kRuns * run;
  group.token_bytes = {page_bytes / kBlock};
  group.row_slots = {kRuns * run};
  group.arena_slots = {(1 + kAreas) * kRuns * run + 1};
  Geometry geometry;
  geometry.page_bytes = page_bytes;
  geometry.max_sequences = kAreas;
  geometry.rows = 1 + kAreas;
  geometry.groups = {group};
  return geometry;
}

struct Times {
  std::vector<i64> bare, driver, extend;
  i64 driver_calls = 0, extend_calls = 0;
};

void repeat(i64 page_bytes, i64 run, Times* times) {
  const i64 pages = kAreas * kRuns * run, row = kRuns * run * page_bytes;
  const Bare bare(kAreas * row);
  const auto driver = make_host_driver(), below = make_host_driver();
  std::vector<PageHandle> handles;
  for (i64 i = 0; i < pages; ++i) handles.push_back(driver->create(page_bytes));
  const Address base = driver->reserve(kAreas * row, 0);
  PrefixOptions options;
  options.on = false;
  Allocator cache(geometry_of(page_bytes, run), std::make_shared<PagePool>(page_bytes, pages, below, true), false,
                  pages, true, options);
  std::vector<i32> ids(kAreas);
  cache.open(kAreas, ids.data());
  const i32 tokens = static_cast<i32>(run * kBlock);
  const i64 before = driver->counters().map, below_before = below->counters().map;
  for (i64 i = 0; i < kRuns * kAreas; ++i) {
    const i64 area = i % kAreas, at = area * row + i / kAreas * run * page_bytes;
    times->bare.push_back(timed([&] { bare.map(at, run * page_bytes, i * run * page_bytes); }));
    times->driver.push_back(
        timed([&] { driver->map_run_open(base + Address(at), page_bytes, &handles[i * run], run); }));
    times->extend.push_back(timed([&] { cache.extend(&ids[area], &tokens, 1, -1); }));
  }
  times->driver_calls += driver->counters().map - before;
  times->extend_calls += below->counters().map - below_before;
  for (i64 area = 0; area < kAreas; ++area) driver->unmap_run(base + Address(area * row), page_bytes, kRuns * run);
  driver->release(base, kAreas * row);
}

}  // namespace
}  // namespace kvmem_bench

int main(int argc, char** argv) {
  using namespace kvmem_bench;
  if (argc != 4) return std::fprintf(stderr, "usage: mapping PAGE_BYTES PAGES_IN_A_RUN REPETITIONS\n"), 2;
  try {
    Times times;
    for (kvmem::i64 i = -1; i < std::atoll(argv[3]); ++i) {
      if (i == 0) times = Times();  // the first warmed up
      repeat(std::atoll(argv[1]), std::atoll(argv[2]), &times);
    }
    std::printf("{");
    print_list("bare_ns", times.bare), print_list("driver_ns", times.driver), print_list("extend_ns", times.extend);
    std::printf("\"driver_calls\": %lld, \"extend_calls\": %lld}\n", static_cast<long long>(times.driver_calls),
                static_cast<long long>(times.extend_calls));
  } catch (const kvmem::Error& error) {
    return std::fprintf(stderr, "mapping: %s\n", error.what()), 2;
  }
  return 0;
}
