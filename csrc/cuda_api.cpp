#include "cuda_api.h"

#include <dlfcn.h>

#include <cstdlib>

namespace kvmem::cuda {
namespace {

// The default stream (0) means the one that all threads share, whatever the caller was compiled with.
constexpr unsigned long long kLegacyStream = 1;

using GetProcAddress11 = Result (*)(const char*, void**, int, unsigned long long);
using GetProcAddress12 = Result (*)(const char*, void**, int, unsigned long long, int*);

class Library {
 public:
  explicit Library(const std::string& name) : name_(name) {
    dlerror();
    void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
      const char* why = dlerror();
      throw DeviceError("no CUDA driver: cannot open " + name + " (" + (why ? why : "unknown reason") +
                            "). Install an NVIDIA driver, set KVMEM_CUDA_DRIVER to its libcuda, or use device=\"cpu\"",
                        "dlopen");
    }
    newer_ = reinterpret_cast<GetProcAddress12>(dlsym(handle, "cuGetProcAddress_v2"));
    older_ = reinterpret_cast<GetProcAddress11>(dlsym(handle, "cuGetProcAddress"));
    if (!newer_ && !older_) {
      throw DeviceError(name + " has no cuGetProcAddress: kvmem needs a driver for CUDA 11.3 or later",
                        "cuGetProcAddress");
    }
  }

  template <class Function>
  void resolve(const char* symbol, int version, Function*& entry) const {
    void* found = nullptr;
    int status = 0;
    const Result code = newer_ ? newer_(symbol, &found, version, kLegacyStream, &status)
                               : older_(symbol, &found, version, kLegacyStream);
    if (code != kSuccess || !found) {
      throw DeviceError(name_ + " has no " + symbol + " as of CUDA " + std::to_string(version / 1000) + "." +
                            std::to_string(version % 1000 / 10) + ": the driver is too old",
                        symbol, code);
    }
    entry = reinterpret_cast<Function*>(found);
  }

 private:
  std::string name_;
  GetProcAddress12 newer_ = nullptr;
  GetProcAddress11 older_ = nullptr;
};

}  // namespace

std::string Api::describe(Result code) const {
  const char *name = nullptr, *text = nullptr;
  if (cuGetErrorString(code, &text) != kSuccess || !text) text = "no description";
  if (cuGetErrorName(code, &name) != kSuccess || !name) return "CUDA error " + std::to_string(code) + " (" + text + ")";
  return std::string(name) + " (" + text + ")";
}

Api load_api(const std::string& library) {
  const char* configured = std::getenv("KVMEM_CUDA_DRIVER");
  const std::string name = !library.empty() ? library : configured && *configured ? configured : "libcuda.so.1";
  const Library source(name);
  Api api;
#define KVMEM_CUDA_RESOLVE(entry, version, ...) source.resolve(#entry, version, api.entry);
  KVMEM_CUDA_ENTRIES(KVMEM_CUDA_RESOLVE)
#undef KVMEM_CUDA_RESOLVE
  return api;
}

}  // namespace kvmem::cuda
