// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations; tables of 8 entries per output or per group.
//
// Values: planes of 2 and 1 bits are joined per output (two vpmovzxbd, two shifts, one vpternlogd),
// then one vpermps into the table twice over.
//
// Measured (4096 x 4096, table per output, one Zen 4 core, processor time against its own 118
// GFLOPS): M = 1: 0.91 ms, M = 4: 73 %, 16: 67 %, 64: 71 %.
//
// Loops, layout and numbers: simd/a32_row_avx512.h.

#include "simd/a32_row_avx512.h"

namespace qkern {

void linear_lut3a32_row_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0,
                               int64_t p1) {
  linear_row<RowCodes<3>>(job, m0, m1, p0, p1);
}

}  // namespace qkern
