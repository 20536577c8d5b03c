// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations; Int: 5 bits, symmetric or with zeros.
//
// Values: planes of 4 and 1 bits are joined for 64 codes at a time, then as linear_w8a32_avx512.
//
// Measured (4096 x 4096, group 128, as linear_w4a32_avx512): M = 1: 1.05 ms, M = 4: 73 %, 16: 72 %,
// 64: 84 %.
//
// Loops, layout and numbers: simd/a32_avx512.h.

#include "simd/a32_avx512.h"

namespace qkern {

void linear_w5a32_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_dword(job, Integer<5>(*job.w), m0, m1, p0, p1);
}

}  // namespace qkern
