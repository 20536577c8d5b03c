// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations; tables of 16 entries per output or per group.
//
// Values: one vpermps.
//
// Measured (4096 x 4096, table per output, one Zen 4 core, processor time against its own 118
// GFLOPS): M = 1: 0.74 ms, M = 4: 84 %, 16: 83 %, 64: 85 %, 256: 84 %. M = 1 falls short of
// linear_lut4a32_avx512 (0.55 ms), also from L2 (0.61 ms).
//
// Loops, layout and numbers: simd/a32_row_avx512.h.

#include "simd/a32_row_avx512.h"

namespace qkern {

void linear_lut4a32_row_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0,
                               int64_t p1) {
  linear_row<RowCodes<4>>(job, m0, m1, p0, p1);
}

}  // namespace qkern
