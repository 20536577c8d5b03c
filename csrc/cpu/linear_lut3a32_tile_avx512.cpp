// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations; 3-bit codes, a table of 8 entries for every tile of 8 outputs and
// a group of columns (LUT-B).
//
// Values: as linear_lut3a32_avx512, with one vpternlogd more for 64 codes, which puts the number of
// the table (outputs 0..7 or 8..15) into bit 3 of the codes.
//
// Loops, layout and numbers: simd/a32_avx512.h.

#include "simd/a32_avx512.h"

namespace qkern {

void linear_lut3a32_tile_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0,
                                int64_t p1) {
  linear_dword(job, TileLookUp(*job.w), m0, m1, p0, p1);
}

}  // namespace qkern
