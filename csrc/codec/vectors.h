// KVMEM_VECTORS: a function that is compiled for several levels of vector unit, of which the loader picks one. Its
// loops go over many numbers, because a call of it cannot be inlined. Sanitizers run too late for the loader's choice.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define KVMEM_CLONES 1
#define KVMEM_VECTORS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KVMEM_CLONES 0
#define KVMEM_VECTORS
#endif

// What such a function calls has to become part of it: else it would be compiled for the default.
#define KVMEM_INLINE inline __attribute__((always_inline))
