// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations; one table of 256 entries for all outputs (codebook8-tensor).
//
// Values: two planes of words, looked up by vpermi2w (simd/lookup8_avx512.h), four columns at once.
// A lookup costs more than four multiplications, so that from two rows on the tiles run over
// decoded floats.
//
// One core of a Zen 4 server at 3.7 GHz, 4096 x 4096: M = 1 / 4 / 16 / 64 in 2.5 / 3.2 / 6.8 /
// 23 ms: bound by shuffles (vpermi2w) at one row, 92 GFLOPS of 118 at 64; the reference takes 76 ms
// at M = 1.
//
// Loops, layout and numbers: simd/a32_avx512.h.

#include "simd/a32_avx512.h"
#include "simd/lookup8_avx512.h"

namespace qkern {
namespace {

struct WideLookUp : Codes<8> {
  static constexpr int kFewRows = 1;
  static constexpr int kMostPanels = 2;  // the table takes 16 registers
  static constexpr int kStoredSize = 4;
  static constexpr bool kQuads = true;
  FloatTable256 table;

  explicit WideLookUp(const Packed& w) : table(static_cast<const float*>(w.table)) {}
  __m512 group_table(const uint8_t*) const { return _mm512_setzero_ps(); }  // of no use
  void values(__m512i quad, __m512 (&v)[4]) const { table.quad(quad, v); }
  void store(__m512i quad, uint8_t* to, int64_t column_bytes, __m512) const {
    __m512 v[4];
    values(quad, v);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_store_ps(to + j * column_bytes, v[j]);
  }
  void describe(float*, FloatTiles* tiles) const { tiles->kind = TileWeights::kFloats; }
};

}  // namespace

void linear_lut8a32_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_dword(job, WideLookUp(*job.w), m0, m1, p0, p1);
}

}  // namespace qkern
