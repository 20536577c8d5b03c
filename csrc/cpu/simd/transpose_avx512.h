// SPDX-License-Identifier: Apache-2.0
// Dwords that change places between registers. AVX-512 F.
#pragma once

#if !defined(__AVX512F__)
#error "compile with -mavx512f"
#endif

#include <immintrin.h>

namespace qkern {
namespace {

// Dword d of 16-byte lane l in vector c moves to dword c of lane l in vector d: four vectors of row
// lanes become four of dword lanes, outputs in order.
inline void transpose_dwords(__m512i (&v)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi32(v[0], v[1]);
  const __m512i high01 = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(v[2], v[3]);
  const __m512i high23 = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(low01, low23);
  v[1] = _mm512_unpackhi_epi64(low01, low23);
  v[2] = _mm512_unpacklo_epi64(high01, high23);
  v[3] = _mm512_unpackhi_epi64(high01, high23);
}

// 16-byte lane j of v[i] and lane i of v[j] change places.
inline void transpose_lanes(__m512i (&v)[4]) {
  const __m512i even01 = _mm512_shuffle_i32x4(v[0], v[1], 0x88);
  const __m512i odd01 = _mm512_shuffle_i32x4(v[0], v[1], 0xdd);
  const __m512i even23 = _mm512_shuffle_i32x4(v[2], v[3], 0x88);
  const __m512i odd23 = _mm512_shuffle_i32x4(v[2], v[3], 0xdd);
  v[0] = _mm512_shuffle_i32x4(even01, even23, 0x88);
  v[1] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
  v[2] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
  v[3] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
}

// Dword j of v[i] and dword i of v[j] change places: 64 shuffles.
inline void transpose_16x16(__m512i (&v)[16]) {
  __m512i rows[4][4];
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) rows[l][i] = v[4 * l + i];
    transpose_dwords(rows[l]);
  }
#pragma GCC unroll 4
  for (int d = 0; d < 4; ++d) {
    __m512i lanes[4] = {rows[0][d], rows[1][d], rows[2][d], rows[3][d]};
    transpose_lanes(lanes);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) v[4 * q + d] = lanes[q];
  }
}

}  // namespace
}  // namespace qkern
