// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, 8-bit Int: smlal (simd/smlal_neon.h). Run under emulation only.
//
// One row: 37 instructions for 8 columns x 16 outputs: two products fit int16 where 4-bit codes
// have four. No Arm processor has run it: speed was judged by these counts.
#include "simd/smlal_neon.h"

namespace qkern {

void linear_w8a8d_neon(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_int8<Int8Int<8>, Smlal>(job, m0, m1, p0, p1);
}

}  // namespace qkern
