// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations; tables of 16 entries, one for all outputs (nf4, fp4, iq4nl,
// mxfp4, codebook4).
//
// Values: a code becomes its entry by one vpermps.
//
// Measured (4096 x 4096, group 64, as linear_w4a32_avx512): M = 1: 0.55 ms, M = 4: 80 %, 16: 78 %,
// 64: 87 %, 256: 86 %.
//
// Loops, layout and numbers: simd/a32_avx512.h.

#include "simd/a32_avx512.h"

namespace qkern {

void linear_lut4a32_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_dword(job, LookUp<4>(*job.w), m0, m1, p0, p1);
}

}  // namespace qkern
