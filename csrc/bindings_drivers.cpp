#include "bindings.h"

namespace kvmem {
void bind_drivers(nanobind::module_&) {}
}  // namespace kvmem
