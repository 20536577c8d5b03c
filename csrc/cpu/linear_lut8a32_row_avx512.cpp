// SPDX-License-Identifier: Apache-2.0
// y = x . W^T, float activations; tables of 256 entries per output or per group (codebook8).
//
// Values: two planes of words, looked up by vpermi2w, 32 columns of one output at once; the table
// takes 16 registers (simd/lookup8_avx512.h).
//
//   up to kFewRows rows: values are used where they are made, output by output.
//   more rows: four outputs of a chunk are decoded to 16 KiB of floats once for all rows of the
//     block; a tile is 6 rows x 4 outputs of 16 lane chains, as in simd/a32_row_avx512.h.
//
// One core of a Zen 4 server at 3.7 GHz, 4096 x 4096, a table per output: M = 1 / 4 / 16 / 64 in
// 3.6 / 4.3 / 10.2 / 27 ms; the reference takes 85 ms at M = 1. Tables are a fifth of what is read.

#include "simd/a32_row_avx512.h"
#include "simd/lookup8_avx512.h"

namespace qkern {
namespace {

constexpr int kFewRows = 4;
constexpr int kOutputs = 4;  // of a tile
constexpr int kUnit = 16;    // columns
constexpr int kUnitBytes = kUnit * kHalf;

// A chunk of one half.
struct Part {
  const uint8_t* codes;
  const float* tables;
  int64_t columns;
  const float* x;  // of the first row
  int64_t x_stride;
};

inline __m128i codes_of(const Part& part, int output, int64_t k) {
  return _mm_loadu_si128(
      (const __m128i*)(part.codes + k * kHalf + lane_offset(Lanes::kRow, output)));
}

// Calls use(k, values) for every 16 columns of an output, ascending.
template <class Use>
inline void for_values(const Part& part, int output, const Use& use) {
  const FloatTable256 table(part.tables + 256 * output);
  for (int64_t k = 0; k < part.columns; k += 2 * kUnit) {
    const bool both = k + kUnit < part.columns;
    const __m128i first = codes_of(part, output, k);
    __m512 v[2];
    table.pair(first, both ? codes_of(part, output, k + kUnit) : first, v);
    use(k, v[0]);
    if (both) use(k + kUnit, v[1]);
  }
}

// Lane chains of R rows and one output to lanes[row][output].
template <int R>
void chains_direct(const Part& part, int output, float* lanes) {
  __m512 s[R];
  for (int r = 0; r < R; ++r) s[r] = _mm512_setzero_ps();
  const uint8_t* next = part.codes + (part.columns + output * part.columns / kHalf) * kHalf;
  for_values(part, output, [&](int64_t k, __m512 v) {
    _mm_prefetch((const char*)next + k, _MM_HINT_T0);
    for (int r = 0; r < R; ++r)
      s[r] = _mm512_fmadd_ps(_mm512_loadu_ps(part.x + r * part.x_stride + k), v, s[r]);
  });
  for (int r = 0; r < R; ++r) _mm512_store_ps(lanes + (r * kHalf + output) * kLanes, s[r]);
}

// The same for R rows and outputs first .. first + 3, whose values are decoded.
template <int R>
void chains_of_tile(const float* values, const Part& part, int64_t row, int first, float* lanes) {
  __m512 s[R][kOutputs];
#pragma GCC unroll 24
  for (int i = 0; i < R * kOutputs; ++i) s[i / kOutputs][i % kOutputs] = _mm512_setzero_ps();
  const float* x = part.x + row * part.x_stride;
  for (int64_t k = 0; k < part.columns; k += kLanes, values += kOutputs * kLanes) {
    __m512 v[kOutputs];
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) v[o] = _mm512_load_ps(values + o * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512 x_r = _mm512_loadu_ps(x + r * part.x_stride + k);
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) s[r][o] = _mm512_fmadd_ps(x_r, v[o], s[r][o]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < R * kOutputs; ++i)
    _mm512_store_ps(lanes + ((row + i / kOutputs) * kHalf + first + i % kOutputs) * kLanes,
                    s[i / kOutputs][i % kOutputs]);
}

void chains_of_few(const Part& part, int64_t rows, float* lanes) {
  using Direct = void (*)(const Part&, int, float*);
  static constexpr Direct kDirect[kFewRows] = {chains_direct<1>, chains_direct<2>, chains_direct<3>,
                                               chains_direct<4>};
  // Outputs whose codes share lines follow each other.
  for (int o = 0; o < kHalf; ++o) kDirect[rows - 1](part, o % 4 * 4 + o / 4, lanes);
}

void chains_of_many(const Part& part, int64_t rows, float* values, float* lanes) {
  using Tile = void (*)(const float*, const Part&, int64_t, int, float*);
  static constexpr Tile kTiles[kLaneTileRows] = {chains_of_tile<1>, chains_of_tile<2>,
                                                 chains_of_tile<3>, chains_of_tile<4>,
                                                 chains_of_tile<5>, chains_of_tile<6>};
  const int64_t tiles = ceil_div(rows, kLaneTileRows);
  for (int first = 0; first < kHalf; first += kOutputs) {
    for (int o = 0; o < kOutputs; ++o)
      for_values(part, first + o, [&](int64_t k, __m512 v) {
        _mm512_store_ps(values + k * kOutputs + o * kLanes, v);
      });
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = rows * i / tiles;
      kTiles[rows * (i + 1) / tiles - row - 1](values, part, row, first, lanes);
    }
  }
}

// Rows [m0, m0 + rows), rows <= kBlockRows, times one half.
void multiply_half(const LinearJob& job, int64_t m0, int64_t rows, int64_t panel) {
  const Packed& w = *job.w;
  alignas(64) float values[kOutputs * kFloatChunk];
  alignas(64) float lanes[kBlockRows * kHalf * kLanes];
  alignas(64) float acc[kBlockRows * kHalf];
  memset(acc, 0, sizeof(float) * (size_t)(rows * kHalf));
  const uint8_t* base = w.panel(panel);
  for (int64_t g = 0; g < w.groups; ++g) {
    const uint8_t* block = w.group_block(base, g, 1);
    const __m512 scale = scales_f32x16(w, w.scales_of(block, g, 1));
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t k = 0; k < padded; k += kFloatChunk) {
      const Part part = {w.codes_of(block) + k / kUnit * kUnitBytes,
                         (const float*)(w.head_bytes ? base : block),
                         min64(kFloatChunk, padded - k),
                         job.x + m0 * job.x_stride + g * w.group_padded + k, job.x_stride};
      if (rows <= kFewRows)
        chains_of_few(part, rows, lanes);
      else
        chains_of_many(part, rows, values, lanes);
      for (int64_t r = 0; r < rows; ++r) {
        float* to = acc + r * kHalf;
        _mm512_store_ps(
            to, _mm512_fmadd_ps(fold_lanes(lanes + r * kHalf * kLanes), scale, _mm512_load_ps(to)));
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    store_outputs(job, m0 + r, panel * kHalf, _mm512_load_ps(acc + r * kHalf));
}

}  // namespace

void linear_lut8a32_row_avx512(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0,
                               int64_t p1) {
  for (int64_t p = p0; p < p1; ++p)
    for (int64_t m = m0; m < m1; m += kBlockRows)
      multiply_half(job, m, min64(kBlockRows, m1 - m), p);
}

}  // namespace qkern
