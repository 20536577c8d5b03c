// SPDX-License-Identifier: Apache-2.0
// y = x . W^T with float activations, 3-bit codes into a table per row or group
// (simd/float_row_neon.h). Run under emulation only.
#include "simd/float_row_neon.h"

namespace qkern {

void linear_lut3a32_row_neon(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_float_row<3>(job, m0, m1, p0, p1);
}

}  // namespace qkern
