// What the files that include Python share. Everything else in csrc/ is free of Python.
#pragma once

#include <nanobind/nanobind.h>

namespace kvmem {
void bind_drivers(nanobind::module_& m);  // bindings_drivers.cpp
void bind_core(nanobind::module_& m);     // bindings_core.cpp
void bind_events(nanobind::module_& m);   // bindings_events.cpp
}  // namespace kvmem
