// SPDX-License-Identifier: Apache-2.0
// y = x . W^T with float activations, 8-bit Int (simd/float_neon.h). Run under emulation only.
//
// One row: 76 instructions for 4 columns x 16 outputs (64 bytes of codes), 16 of them fmla. No Arm
// processor has run it: speed was judged by these counts.
#include "simd/float_neon.h"

namespace qkern {

void linear_w8a32_neon(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_float<FloatWideInt<8>>(job, m0, m1, p0, p1);
}

}  // namespace qkern
