// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations; tables of 4 entries, one for all outputs.
//
// Values: vpermps into the table four times over, so that no code is masked.
//
// Measured as linear_w2a32_avx512, whose instructions these are.
//
// Loops, layout and numbers: simd/a32_avx512.h.

#include "simd/a32_avx512.h"

namespace qkern {

void linear_lut2a32_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_dword(job, LookUp<2>(*job.w), m0, m1, p0, p1);
}

}  // namespace qkern
