// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations; Int: 2 bits, symmetric or with zeros.
//
// Values: vpermps into a table of the 4 integers four times over, so that no code is masked.
//
// Measured (4096 x 4096, group 128, as linear_w4a32_avx512): M = 1: 0.52 ms, M = 4: 85 %, 16: 85 %,
// 64: 91 %.
//
// Loops, layout and numbers: simd/a32_avx512.h.

#include "simd/a32_avx512.h"

namespace qkern {

void linear_w2a32_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_dword(job, LookUp<2>(*job.w), m0, m1, p0, p1);
}

}  // namespace qkern
