// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, 4-bit codes into a table per row or group: smlal (simd/smlal_neon.h). Run
// under emulation only.
#include "simd/smlal_neon.h"

namespace qkern {

void linear_lut4a8d_row_neon(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_int8<Int8Table<4, Lanes::kRow>, Smlal>(job, m0, m1, p0, p1);
}

}  // namespace qkern
