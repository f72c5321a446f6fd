// KVMEM_ASSERT(condition, sentence) states a pre-condition or a post-condition. Debug builds (KVMEM_DEBUG) evaluate the
// condition and, where it is false, print the sentence and abort. Release builds do not evaluate it, so it may be
// expensive, and it must have no side effect.
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
