// The default map_run() and unmap_run(): one call for each page.

#include "driver/driver.h"

#include <cstdio>
#include <exception>
#include <new>
#include <vector>

namespace kvmem {

void UndoFailed::raise(const std::string& doing, const std::exception& cause, const std::exception& undo) {
  try {
    const auto* error = dynamic_cast<const DeviceError*>(&undo);
    throw UndoFailed(doing + " failed (" + cause.what() + ") and could not be undone (" + undo.what() + ")",
                     error ? error->call() : "", error ? error->code() : 0);
  } catch (const std::bad_alloc&) {
    throw UndoFailed("");
  }
}

std::string range_text(Address at, i64 bytes) {
  char text[64];
  std::snprintf(text, sizeof text, "[0x%zx, +%lld)", static_cast<size_t>(at), static_cast<long long>(bytes));
  return text;
}

void Driver::map_run(Address at, i64 page_bytes, const PageHandle* pages, i64 count) {
  i64 mapped = 0;
  try {
    for (; mapped < count; ++mapped) map(at + mapped * page_bytes, page_bytes, 0, pages[mapped]);
  } catch (const std::exception& cause) {
    undo_call(*this, "map_run", cause, [&] {
      while (mapped > 0) unmap(at + --mapped * page_bytes, page_bytes);
    });
    throw;
  }
}

void Driver::unmap_run(Address at, i64 page_bytes, i64 count) {
  std::vector<Mapped> unmapped;
  unmapped.reserve(count);
  try {
    for (i64 i = 0; i < count; ++i) {
      const Mapped before = mapped_at(at + i * page_bytes);
      unmap(at + i * page_bytes, page_bytes);
      unmapped.push_back(before);
    }
  } catch (const std::exception& cause) {
    undo_call(*this, "unmap_run", cause, [&] {
      for (; !unmapped.empty(); unmapped.pop_back()) {
        const Address page_at = at + (unmapped.size() - 1) * page_bytes;
        map(page_at, page_bytes, 0, unmapped.back().page);
        if (unmapped.back().accessible) set_access(page_at, page_bytes);
      }
    });
    throw;
  }
}

}  // namespace kvmem
