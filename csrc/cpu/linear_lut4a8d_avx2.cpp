// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, 4-bit codes into one table: a vpshufb makes wide values
// (simd/int8_avx2.h).
//
// One core of a Zen 4 server at 3.7 GHz, 4096 x 4096, groups of 64 with float16 scales:
// M = 1 / 16 / 64 in 0.83 / 4.3 / 16.2 ms: 10.9 GB/s; 131 and 138 GOPS.
#include "simd/int8_avx2.h"

namespace qkern {

void linear_lut4a8d_avx2(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_int8<Int8Table<4>>(job, m0, m1, p0, p1);
}

}  // namespace qkern
