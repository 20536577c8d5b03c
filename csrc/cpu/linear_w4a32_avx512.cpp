// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations; Int: 4 bits, symmetric or with zeros.
//
// Values: a code becomes its value by one vpermps into a table of the 16 integers (symmetric: code
// - 8).
//
// Measured (4096 x 4096, group 128, one Zen 4 core of a shared machine, best processor time against
// 118 GFLOPS and 24 to 27 GB/s of the same run): M = 1: 0.53 ms (0.51 ms where weights are in L2:
// the unpacking is the limit), M = 4: 72 to 82 % of peak, 16: 79 %, 64: 89 %, 256: 88 %.
//
// Loops, layout and numbers: simd/a32_avx512.h.

#include "simd/a32_avx512.h"

namespace qkern {

void linear_w4a32_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_dword(job, LookUp<4>(*job.w), m0, m1, p0, p1);
}

}  // namespace qkern
