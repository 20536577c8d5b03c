// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, 4-bit codes into a table per row or group: sdot (simd/sdot_neon.h). Run
// under emulation only.
//
// One row: 35 instructions for 32 columns x 4 outputs (64 bytes of codes): a register is one
// output, looked up in its own table and multiplied as it lies. No Arm processor has run it: speed
// was judged by these counts.
#include "simd/sdot_neon.h"

namespace qkern {

void linear_lut4a8d_row_neondot(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0,
                                int64_t p1) {
  linear_int8<Int8Table<4, Lanes::kRow>, Sdot>(job, m0, m1, p0, p1);
}

}  // namespace qkern
