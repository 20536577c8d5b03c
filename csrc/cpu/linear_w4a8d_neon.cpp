// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, 4-bit Int: smlal (simd/smlal_neon.h). Run under emulation only.
//
// One row: 61 instructions for 16 columns x 16 outputs, 32 of them products and 8 sadalp; taking
// the codes apart comes once for all rows of a block. No Arm processor has run it: speed was judged
// by these counts.
#include "simd/smlal_neon.h"

namespace qkern {

void linear_w4a8d_neon(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_int8<Int8Int<4>, Smlal>(job, m0, m1, p0, p1);
}

}  // namespace qkern
