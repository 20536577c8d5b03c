// SPDX-License-Identifier: Apache-2.0
// y = x . W^T with float activations, 4-bit codes into a table per row or group
// (simd/float_row_neon.h). Run under emulation only.
//
// One row: 44 instructions for 32 columns of an output (16 bytes of codes), 8 of them fmla. The
// tile: 27 for 4 rows x 4 columns x 4 outputs, 16 of them fmla. No Arm processor has run it: speed
// was judged by these counts.
#include "simd/float_row_neon.h"

namespace qkern {

void linear_lut4a32_row_neon(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_float_row<4>(job, m0, m1, p0, p1);
}

}  // namespace qkern
