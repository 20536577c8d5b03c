// SPDX-License-Identifier: Apache-2.0
// The register tile of the float linear kernels over dword lanes: 6 rows x 64 outputs, outputs in
// lanes.
//
// Cost: per column 24 vfmadd231ps, 6 broadcasts of x, and 4 values: bytes of codes that become
// float32 in registers (shift and vpermps; integers wider than 4 bits: two shifts and vcvtdq2ps).
// Registers: 24 sums, 4 values, 1 broadcast, the table. Rows are dealt evenly, so that no tile is
// left with one row.
//
// Values that are costlier to make come decoded: their maker knows how often they are used.
//
// Tried and lost: values decoded to a float32 scratch of 64 columns first (stores and the reloading
// of partial sums cost 2 % at 64 rows, 8 % at 16); 12 rows x 32 outputs (8 % slower); integers as
// mantissa bits of 2^23 (vpternlogd takes issue slots from the multiplications on Zen 4: 6 %).

#include "simd/a32_tiles.h"
#include "simd/rows_avx512.h"

namespace qkern {
namespace {

constexpr int kTileRows = 6;

struct Entries {
  static constexpr int kSize = 1;  // bytes of a weight
  __m512 table;

  explicit Entries(const FloatTiles& t) : table(_mm512_load_ps(t.table)) {}
  __m512 operator()(const uint8_t* vector, int column, int) const {
    const __m512i codes = _mm512_load_si512(vector);
    return _mm512_permutexvar_ps(column ? _mm512_srli_epi32(codes, (unsigned)(8 * column)) : codes,
                                 table);
  }
};

// Four tables do not fit beside 24 sums: vpermps takes its entries from memory.
struct OwnEntries {
  static constexpr int kSize = 1;
  const float* tables;

  explicit OwnEntries(const FloatTiles& t) : tables(t.table) {}
  __m512 operator()(const uint8_t* vector, int column, int c) const {
    const __m512i codes = _mm512_load_si512(vector);
    return _mm512_permutexvar_ps(column ? _mm512_srli_epi32(codes, (unsigned)(8 * column)) : codes,
                                 _mm512_load_ps(tables + 16 * c));
  }
};

template <bool SIGNED>
struct Integers {
  static constexpr int kSize = 1;
  explicit Integers(const FloatTiles&) {}
  __m512 operator()(const uint8_t* vector, int column, int) const {
    __m512i v = _mm512_load_si512(vector);
    if (column < 3) v = _mm512_slli_epi32(v, (unsigned)(24 - 8 * column));
    return _mm512_cvtepi32_ps(SIGNED ? _mm512_srai_epi32(v, 24) : _mm512_srli_epi32(v, 24));
  }
};

struct Floats {
  static constexpr int kSize = 4;
  explicit Floats(const FloatTiles&) {}
  __m512 operator()(const uint8_t* vector, int, int) const { return _mm512_load_ps(vector); }
};

template <class Weights, int R, int C>
void tile(const FloatTiles& t, int64_t row) {
  const Weights value(t);
  __m512 s[R][C];
  float* sums = t.sums + row * kTileOutputs;
#pragma GCC unroll 24
  for (int i = 0; i < R * C; ++i)
    s[i / C][i % C] =
        t.resume ? _mm512_load_ps(sums + i / C * kTileOutputs + 16 * (i % C)) : _mm512_setzero_ps();
  const float* x = t.x + row * t.x_stride;
  const uint8_t* weights = t.weights;
  for (const float* end = x + t.columns; x != end; x += 4, weights += 64 * C * Weights::kSize) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      __m512 v[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        v[c] = value(weights + 64 * (Weights::kSize == 4 ? C * k + c : c), k, c);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512 broadcast = _mm512_set1_ps(x[r * t.x_stride + k]);
        for (int c = 0; c < C; ++c) s[r][c] = _mm512_fmadd_ps(broadcast, v[c], s[r][c]);
      }
    }
  }
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

template <class Weights, int C>
void rows_of_tiles(const FloatTiles& t) {
  using Tile = void (*)(const FloatTiles&, int64_t);
  static constexpr Tile kTiles[kTileRows] = {tile<Weights, 1, C>, tile<Weights, 2, C>,
                                             tile<Weights, 3, C>, tile<Weights, 4, C>,
                                             tile<Weights, 5, C>, tile<Weights, 6, C>};
  const int64_t tiles = ceil_div(t.rows, kTileRows);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t row = t.rows * i / tiles;
    kTiles[t.rows * (i + 1) / tiles - row - 1](t, row);
  }
}

template <class Weights>
void multiply(const FloatTiles& t) {
  switch (t.vectors) {
    case 4:
      return rows_of_tiles<Weights, 4>(t);
    case 3:
      return rows_of_tiles<Weights, 3>(t);
    case 2:
      return rows_of_tiles<Weights, 2>(t);
    default:
      return rows_of_tiles<Weights, 1>(t);
  }
}

}  // namespace

void a32_tiles_avx512(const FloatTiles& t) {
  switch (t.kind) {
    case TileWeights::kEntries:
      return multiply<Entries>(t);
    case TileWeights::kOwnEntries:
      return multiply<OwnEntries>(t);
    case TileWeights::kSigned:
      return multiply<Integers<true>>(t);
    case TileWeights::kFloats:
      return multiply<Floats>(t);
    default:
      return multiply<Integers<false>>(t);
  }
}

}  // namespace qkern
