// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, 4-bit Int: sdot (simd/sdot_neon.h). Run under emulation only.
//
// One row: 24 instructions for 8 columns x 16 outputs (64 bytes of codes), 4 rows 50; the tile 82
// for 4 rows x 16 columns x 16 outputs, 64 of them sdot. No Arm processor has run it: speed was
// judged by these counts.
#include "simd/sdot_neon.h"

namespace qkern {

void linear_w4a8d_neondot(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_int8<Int8Int<4>, Sdot>(job, m0, m1, p0, p1);
}

}  // namespace qkern
