// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations, int8 weights.
//
// todo

#include "simd/a32_avx512.h"

namespace qkern {

void linear_w8a32_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_dword(job, Integer<8>(*job.w), m0, m1, p0, p1);
}

}  // namespace qkern
