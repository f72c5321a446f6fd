// A wrapper around any driver that refuses what CUDA's documentation forbids, fails the n-th call on request, can hold
// events back, and counts. Debug builds of the allocator and most tests run on it.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "driver.h"

namespace kvmem {

class CheckedDriver;  // see driver_checked.cpp
std::shared_ptr<CheckedDriver> make_checked_driver(std::shared_ptr<Driver> inner);

}  // namespace kvmem
