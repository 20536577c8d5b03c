// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations; Int: 3 bits, symmetric or with zeros.
//
// Values: planes of 2 and 1 bits are joined for 64 codes at a time (two shifts, one vpternlogd),
// then vpermps into a table of the 8 integers twice over.
//
// Measured (4096 x 4096, group 128, as linear_w4a32_avx512): M = 1: 0.63 ms, M = 4: 81 %, 16: 73 %,
// 64: 83 %.
//
// Loops, layout and numbers: simd/a32_avx512.h.

#include "simd/a32_avx512.h"

namespace qkern {

void linear_w3a32_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_dword(job, LookUp<3>(*job.w), m0, m1, p0, p1);
}

}  // namespace qkern
