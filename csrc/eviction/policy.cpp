#include "eviction/policy.h"

namespace kvmem {
namespace {

struct Entry {
  const char* name;
  std::unique_ptr<EvictionPolicy> (*make)();
};

constexpr Entry kPolicies[] = {{"density", make_density_policy}, {"lru", make_lru_policy}};  // the default first

}  // namespace

std::vector<std::string> eviction_policy_names() {
  std::vector<std::string> names;
  for (const Entry& entry : kPolicies) names.emplace_back(entry.name);
  return names;
}

std::unique_ptr<EvictionPolicy> make_eviction_policy(const std::string& name) {
  std::string known;
  for (const Entry& entry : kPolicies) {
    if (name == entry.name) return entry.make();
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw SpecError("policy: got '" + name + "'; must be one of " + known);
}

}  // namespace kvmem
