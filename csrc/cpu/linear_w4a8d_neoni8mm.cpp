// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, 4-bit Int: smmla from 5 rows on, sdot below (simd/smmla_neon.h). Run
// under emulation only.
//
// The tile: 30 instructions for 4 rows x 8 columns x 16 outputs, 16 of them smmla, where sdot takes
// 41. No Arm processor has run it: speed was judged by these counts.
#include "simd/smmla_neon.h"

namespace qkern {

void linear_w4a8d_neoni8mm(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_int8<Int8Int<4>, Smmla>(job, m0, m1, p0, p1);
}

}  // namespace qkern
