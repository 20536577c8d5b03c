// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, 3-bit Int: sdot (simd/sdot_neon.h). Run under emulation only.
#include "simd/sdot_neon.h"

namespace qkern {

void linear_w3a8d_neondot(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_int8<Int8Int<3>, Sdot>(job, m0, m1, p0, p1);
}

}  // namespace qkern
