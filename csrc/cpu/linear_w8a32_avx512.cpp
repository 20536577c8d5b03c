// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations; Int: 8 bits, symmetric or with zeros.
//
// Values: few rows: shift, vpternlogd into the mantissa of 2^23, vsubps; tiles: two shifts and
// vcvtdq2ps.
//
// Measured (4096 x 4096, one scale per row, as linear_w4a32_avx512): M = 1: 84 to 94 % of read
// bandwidth, M = 4: 76 %, 16: 74 %, 64: 89 %, 256: 92 %. Tried and lost: two shifts and vcvtdq2ps
// for few rows (1.5 times the time at M = 1: shifts and conversions share two pipes).
//
// Loops, layout and numbers: simd/a32_avx512.h.

#include "simd/a32_avx512.h"

namespace qkern {

void linear_w8a32_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_dword(job, Integer<8>(*job.w), m0, m1, p0, p1);
}

}  // namespace qkern
