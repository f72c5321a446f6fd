// KVMEM_ASSERT: what a function requires, or what holds when it is done. Debug builds (KVMEM_DEBUG) check it and abort
// with the sentence; release builds compile nothing, so a condition may be expensive, and must have no effect.
#pragma once

#ifdef KVMEM_DEBUG

#include <cstdio>
#include <cstdlib>

#define KVMEM_ASSERT(condition, sentence)                                                               \
  do {                                                                                                  \
    if (!(condition)) {                                                                                 \
      std::fprintf(stderr, "%s:%d: %s: %s (%s)\n", __FILE__, __LINE__, __func__, sentence, #condition); \
      std::abort();                                                                                     \
    }                                                                                                   \
  } while (false)

#else

#define KVMEM_ASSERT(condition, sentence) static_cast<void>(sizeof(!(condition)))

#endif
