// SPDX-License-Identifier: Apache-2.0
// The register tile of all float linear kernels: 6 rows x 64 outputs, outputs in lanes.
//
// Cost: per column 24 vfmadd231ps, 4 loads of values (L1), 6 broadcasts of x: FMA bound on every
// AVX-512 processor. Registers: 24 sums, 4 values, 1 broadcast. Rows are dealt evenly, so that no
// tile is left with one row.

#include "simd/a32_tiles.h"
#include "simd/rows_avx512.h"

namespace qkern {
namespace {

constexpr int kTileRows = 6;

template <int R, int C>
void tile(const FloatTiles& t, int64_t row) {
  __m512 s[R][C];
  float* sums = t.sums + row * kTileOutputs;
#pragma GCC unroll 24
  for (int i = 0; i < R * C; ++i)
    s[i / C][i % C] = t.resume ? _mm512_load_ps(sums + i / C * kTileOutputs + 16 * (i % C))
                               : _mm512_setzero_ps();
  const float* x = t.x + row * t.x_stride;
  const float* values = t.values;
  for (const float* end = x + t.columns; x != end; ++x, values += 16 * C) {
    __m512 v[C];
    for (int c = 0; c < C; ++c) v[c] = _mm512_load_ps(values + 16 * c);
    for (int r = 0; r < R; ++r) {
      const __m512 broadcast = _mm512_set1_ps(x[r * t.x_stride]);
      for (int c = 0; c < C; ++c) s[r][c] = _mm512_fmadd_ps(broadcast, v[c], s[r][c]);
    }
  }
  if (t.fold)
#pragma GCC unroll 24
    for (int i = 0; i < R * C; ++i)
      s[i / C][i % C] =
          _mm512_add_ps(_mm512_load_ps(sums + i / C * kTileOutputs + 16 * (i % C)), s[i / C][i % C]);
  if (!t.finish) {
#pragma GCC unroll 24
    for (int i = 0; i < R * C; ++i)
      _mm512_store_ps(sums + i / C * kTileOutputs + 16 * (i % C), s[i / C][i % C]);
    return;
  }
  if (t.minus_zeros)
#pragma GCC unroll 24
    for (int i = 0; i < R * C; ++i)
      s[i / C][i % C] =
          _mm512_fmadd_ps(_mm512_load_ps(t.minus_zeros + 16 * (i % C)),
                          _mm512_set1_ps(t.x_sum[(row + i / C) * t.x_sum_stride]), s[i / C][i % C]);
  float* acc = t.acc + row * kTileOutputs;
#pragma GCC unroll 24
  for (int i = 0; i < R * C; ++i) {
    float* to = acc + i / C * kTileOutputs + 16 * (i % C);
    _mm512_store_ps(to, _mm512_fmadd_ps(s[i / C][i % C], _mm512_load_ps(t.scales + 16 * (i % C)),
                                        _mm512_load_ps(to)));
  }
}

template <int C>
void rows_of_tiles(const FloatTiles& t) {
  const int64_t tiles = ceil_div(t.rows, kTileRows);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t row = t.rows * i / tiles, rows = t.rows * (i + 1) / tiles - row;
    switch (rows) {
      case 6:
        tile<6, C>(t, row);
        break;
      case 5:
        tile<5, C>(t, row);
        break;
      case 4:
        tile<4, C>(t, row);
        break;
      case 3:
        tile<3, C>(t, row);
        break;
      case 2:
        tile<2, C>(t, row);
        break;
      default:
        tile<1, C>(t, row);
    }
  }
}

}  // namespace

void a32_tiles_avx512(const FloatTiles& t) {
  switch (t.vectors) {
    case 4:
      return rows_of_tiles<4>(t);
    case 3:
      return rows_of_tiles<3>(t);
    case 2:
      return rows_of_tiles<2>(t);
    default:
      return rows_of_tiles<1>(t);
  }
}

}  // namespace qkern
