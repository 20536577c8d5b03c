// SPDX-License-Identifier: Apache-2.0
// y = x . W^T with float activations, 4-bit codes into one table (simd/float_neon.h). Run under
// emulation only.
//
// One row: 158 instructions for 8 columns x 16 outputs, 32 of them fmla: four planes of bytes where
// 4-bit Int needs two. No Arm processor has run it: speed was judged by these counts.
#include "simd/float_neon.h"

namespace qkern {

void linear_lut4a32_neon(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_float<FloatTable<4>>(job, m0, m1, p0, p1);
}

}  // namespace qkern
