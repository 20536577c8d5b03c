// SPDX-License-Identifier: Apache-2.0
// y = x . W^T with float activations, 4-bit Int (simd/float_neon.h). Run under emulation only.
//
// One row: 122 instructions for 8 columns x 16 outputs (64 bytes of codes), 32 of them fmla: bound
// by making the floats. The tile: 87 for 4 rows x 4 columns x 16 outputs, 64 of them fmla. No Arm
// processor has run it: speed was judged by these counts.
#include "simd/float_neon.h"

namespace qkern {

void linear_w4a32_neon(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_float<FloatSmallInt<4>>(job, m0, m1, p0, p1);
}

}  // namespace qkern
