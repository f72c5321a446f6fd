// Bugs planted on purpose. `make test-sanitize` runs each one first and fails unless its sanitizer reports it: a run
// that finds nothing must mean that there was nothing to find.

#include <cstdio>
#include <cstring>
#include <limits>
#include <thread>

namespace {

// volatile, so that the compiler neither warns about these bugs nor optimises them away.
volatile int eight = 8;
volatile int largest = std::numeric_limits<int>::max();
int shared_counter = 0;

void count() {
  for (int i = 0; i < 100000; ++i) ++shared_counter;
}

void leak() {
  char* volatile lost = new char[64];
  lost[0] = 1;
  lost = nullptr;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int overflow() {
  char* volatile bytes = new char[8];  // the compiler must not know the size, or UBSan reports it before ASan can
  bytes[eight] = 1;
  const int result = bytes[eight];
  delete[] bytes;
  return result;
}

extern "C" __attribute__((visibility("default"))) void race() {
  std::thread other(count);
  count();
  other.join();
}

int main(int argc, char** argv) {
  const char* bug = argc > 1 ? argv[1] : "";
  if (std::strcmp(bug, "overflow") == 0) {
    overflow();
  } else if (std::strcmp(bug, "undefined") == 0) {
    largest = largest + 1;
  } else if (std::strcmp(bug, "leak") == 0) {
    leak();
  } else if (std::strcmp(bug, "race") == 0) {
    race();
  }
  std::puts("no sanitizer stopped this program");
  return 0;
}
