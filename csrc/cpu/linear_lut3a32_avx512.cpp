// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations; tables of 8 entries, one for all outputs.
//
// Values: planes of 2 and 1 bits are joined for 64 codes at a time, then vpermps into the table
// twice over.
//
// Measured as linear_w3a32_avx512, whose instructions these are.
//
// Loops, layout and numbers: simd/a32_avx512.h.

#include "simd/a32_avx512.h"

namespace qkern {

void linear_lut3a32_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_dword(job, LookUp<3>(*job.w), m0, m1, p0, p1);
}

}  // namespace qkern
