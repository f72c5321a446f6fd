#include "driver/cuda/cuda_api.h"

#include <dlfcn.h>

#include <cstdlib>

namespace kvmem::cuda {
namespace {

// Makes stream 0 the default stream that all threads share, however the caller was compiled.
constexpr unsigned long long kLegacyStream = 1;

// The first release with cuGetProcAddress, which finds the other entry points. All of these are older.
constexpr int kNeededVersion = 11030;

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
    const auto version = reinterpret_cast<Result (*)(int*)>(dlsym(handle, "cuDriverGetVersion"));
    if (version && version(&version_) != kSuccess) version_ = 0;  // allowed before cuInit
    if (!newer_ && !older_) {
      throw DeviceError(name + " has no cuGetProcAddress: " + too_old(), "cuGetProcAddress");
    }
    if (version_ > 0 && version_ < kNeededVersion) throw DeviceError(name + ": " + too_old(), "cuDriverGetVersion");
  }

  template <class Function>
  void resolve(const char* symbol, int version, Function*& entry) const {
    void* found = nullptr;
    int status = 0;
    const Result code = newer_ ? newer_(symbol, &found, version, kLegacyStream, &status)
                               : older_(symbol, &found, version, kLegacyStream);
    if (code != kSuccess || !found) {
      throw DeviceError(name_ + " has no " + symbol + " as of " + version_text(version) + ": " + too_old(), symbol,
                        code);
    }
    entry = reinterpret_cast<Function*>(found);
  }

 private:
  std::string too_old() const {
    const std::string found = version_ > 0 ? "is for " + version_text(version_) : "does not say its version";
    return "the driver is too old: it " + found + ", kvmem needs one for " + version_text(kNeededVersion) + " or later";
  }

  std::string name_;
  int version_ = 0;
  GetProcAddress12 newer_ = nullptr;
  GetProcAddress11 older_ = nullptr;
};

}  // namespace

std::string version_text(int version) {
  return "CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

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
