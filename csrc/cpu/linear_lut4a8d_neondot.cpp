// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, 4-bit codes into one table: sdot (simd/sdot_neon.h). Run under emulation
// only.
//
// One row: 30 instructions for 8 columns x 16 outputs: a tbl per register more than 4-bit Int. No
// Arm processor has run it: speed was judged by these counts.
#include "simd/sdot_neon.h"

namespace qkern {

void linear_lut4a8d_neondot(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_int8<Int8Table<4, Lanes::kDword>, Sdot>(job, m0, m1, p0, p1);
}

}  // namespace qkern
