// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, 4-bit Int: narrow values (simd/int8_avx2.h), up to 8 vpmaddubsw in int16.
//
// One core of a Zen 4 server at 3.7 GHz, 4096 x 4096, groups of 128 with float16 scales:
// M = 1 / 16 / 64 in 0.56 / 2.7 / 9.1 ms: 15.9 GB/s of the 16.5 that plain reads reach; 208 and 253
// GOPS, where registers alone give 234 with vpmaddwd and vpaddd after every vpmaddubsw and 380
// without.
#include "simd/int8_avx2.h"

namespace qkern {

void linear_w4a8d_avx2(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_int8<Int8Int<4>>(job, m0, m1, p0, p1);
}

}  // namespace qkern
