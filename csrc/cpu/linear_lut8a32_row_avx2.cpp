// SPDX-License-Identifier: Apache-2.0
// y = x . W^T with float activations, 8-bit codes into a table per row or group
// (simd/float_row_avx2.h, simd/lookup8_avx2.h).
//
// One core of a Zen 4 server at 3.7 GHz, 4096 x 4096: M = 1 / 16 / 64 in 5.9 / 14 / 34 ms: bound by
// the loads of single entries at one row; 63 GFLOPS of 112 at 64.
#include "simd/float_row_avx2.h"

namespace qkern {

void linear_lut8a32_row_avx2(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_float_row<8>(job, m0, m1, p0, p1);
}

}  // namespace qkern
