// SPDX-License-Identifier: Apache-2.0
// Whether a call leaves vector or tile registers in use: SSE code of the caller would wait for
// upper halves that nobody reads, and the system would save the tiles at every switch of threads.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sweep {

#if defined(__x86_64__)

// XGETBV with 1: which parts of the state are not as after a reset, where processors tell.
inline uint64_t state_in_use() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;  // OSXSAVE
  if (!__get_cpuid_count(0xd, 1, &a, &b, &c, &d) || !(a >> 2 & 1)) return 0;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return (uint64_t)high << 32 | low;
}

inline void clean_registers() {
  uint32_t a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) && (c >> 28 & 1)) asm volatile("vzeroupper");  // AVX
}

// Upper halves of ymm (bit 2) and zmm (6), tile configuration (17) and data (18).
inline bool registers_clean() { return (state_in_use() & 0x60044) == 0; }

#else

inline void clean_registers() {}
inline bool registers_clean() { return true; }

#endif

}  // namespace sweep
