// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, 8-bit codes into a table of bytes per row or group: two rows per
// register, then a transposition to wide values of dword lanes (simd/int8_avx2.h,
// simd/lookup8_avx2.h).
//
// One core of a Zen 4 server at 3.7 GHz, 4096 x 4096: M = 1 / 16 / 64 in 4.7 / 7.0 / 26 ms.
//
// The tables of a pair of rows are put side by side once per piece; they do not fit the registers.
#include "simd/int8_avx2.h"
#include "simd/lookup8_avx2.h"

namespace qkern {
namespace {

struct Int8WideRowTable {
  static constexpr int kRun = kWide;

  static void unpack(const Piece& p, uint8_t* values) {
    for (int v = 0; v < 2; ++v) {
      // Register v of vector c holds rows 8v + c and 8v + 4 + c.
      alignas(32) uint8_t tables[4][16][32];
      for (int c = 0; c < 4; ++c) {
        const uint8_t* first = p.tables + (8 * v + c) * 256;
        for (int i = 0; i < 16; ++i)
          store256(tables[c][i],
                   _mm256_set_m128i(load128(first + 4 * 256 + 16 * i), load128(first + 16 * i)));
      }
      const uint8_t* at = p.codes + 32 * v;
      for (int64_t step = 0; step < p.columns / 4; step += 4, at += kRowUnitBytes<8>) {
        if (v == 0) prefetch_ahead(at, kRowUnitBytes<8>);
        __m256i rows[4], dwords[4];
        for (int c = 0; c < 4; ++c)
          rows[c] =
              look_up_bytes([&](int i) { return load256(tables[c][i]); }, load256(at + 64 * c));
        transpose_dwords(rows, dwords);
        for (int d = 0; d < 4; ++d) store_values<kRun>(values, 0, step + d, v, dwords[d]);
      }
    }
  }
};

}  // namespace

void linear_lut8a8d_row_avx2(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_int8<Int8WideRowTable>(job, m0, m1, p0, p1);
}

}  // namespace qkern
