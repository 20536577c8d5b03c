// SPDX-License-Identifier: Apache-2.0
// y = x . W^T with float activations, 8-bit codes into one table (simd/float_avx2.h,
// simd/lookup8_avx2.h).
//
// One core of a Zen 4 server at 3.7 GHz, 4096 x 4096: M = 1 / 16 / 64 in 4.7 / 10.5 / 26 ms: bound
// by the loads of single entries at one row; 83 GFLOPS of 112 at 64.
#include "simd/float_avx2.h"
#include "simd/lookup8_avx2.h"

namespace qkern {
namespace {

struct FloatWideTable {
  static constexpr int kBits = 8;
  const float* table;

  explicit FloatWideTable(const Packed& w) : table(static_cast<const float*>(w.table)) {}

  void enter(const Piece&) {}

  // Byte j of dword r is column j of output r: turned around, a dword is a column of four outputs.
  void values(int, __m256i codes, __m256 v[4]) const {
    WidePair{table, table}.look_up(transpose_bytes(codes), v);
  }

  template <int kCount>
  void add_columns(const __m256i* codes, const float* x, __m256* acc) const {
    __m256 one[4];
    repeat<4>([&](int j) { one[j] = _mm256_broadcast_ss(x + j); });
    repeat<kCount>([&](int i) {
      __m256 v[4];
      values(i, codes[i], v);
      repeat<4>([&](int j) { acc[i] = _mm256_fmadd_ps(one[j], v[j], acc[i]); });
    });
  }
};

}  // namespace

void linear_lut8a32_avx2(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  linear_float<FloatWideTable>(job, m0, m1, p0, p1);
}

}  // namespace qkern
