// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, 8-bit codes into one table of bytes (simd/int8_avx2.h,
// simd/lookup8_avx2.h).
//
// One core of a Zen 4 server at 3.7 GHz, 4096 x 4096: M = 1 / 16 / 64 in 3.2 / 7.7 / 21 ms: bound
// by shuffles and blends, 52 instructions per 32 weights.
#include "simd/int8_avx2.h"
#include "simd/lookup8_avx2.h"

namespace qkern {
namespace {

struct Int8WideTable {
  static constexpr int kRun = kWide;

  static void unpack(const Piece& p, uint8_t* values) {
    const uint8_t* table = p.tables;
    const auto part = [table](int i) {
      return _mm256_broadcastsi128_si256(load128(table + 16 * i));
    };
    for_dword_codes<8>(p, [&](int half, int64_t step, int v, __m256i codes) {
      store_values<kRun>(values, half, step, v, look_up_bytes(part, codes));
    });
  }
};

}  // namespace

void linear_lut8a8d_avx2(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_int8<Int8WideTable>(job, m0, m1, p0, p1);
}

}  // namespace qkern
