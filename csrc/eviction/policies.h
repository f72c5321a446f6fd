// What eviction.cpp chooses from: one function a policy, one file a policy.
#pragma once

#include "eviction.h"

namespace kvmem {

std::unique_ptr<EvictionPolicy> make_lru_policy();      // eviction_lru.cpp
std::unique_ptr<EvictionPolicy> make_density_policy();  // eviction_density.cpp

}  // namespace kvmem
