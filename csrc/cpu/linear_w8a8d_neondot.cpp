// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, 8-bit Int: sdot (simd/sdot_neon.h). Run under emulation only.
//
// One row: 14 instructions for 4 columns x 16 outputs (64 bytes of codes). No Arm processor has run
// it: speed was judged by these counts.
#include "simd/sdot_neon.h"

namespace qkern {

void linear_w8a8d_neondot(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_int8<Int8Int<8>, Sdot>(job, m0, m1, p0, p1);
}

}  // namespace qkern
