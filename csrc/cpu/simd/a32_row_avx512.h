// SPDX-License-Identifier: Apache-2.0
// The chassis of the float linear kernels over row lanes (layout.h): a table per row or per group.
// AVX-512 F, BW, DQ, VL.
//
// A table serves one output only, so one vpermps looks up 16 columns of one output: the 16 lane
// chains of the contract lie in one register. Up to kStreamRows rows that is the whole kernel; a
// 16x16 transpose per chunk lets 16 outputs fold their lanes at once. More rows: looked-up values
// are transposed while they go to scratch, so that lane l of a chunk becomes one chain with outputs
// in lanes; the tile of a32_tiles_avx512.cpp runs it over LinearJob::x_lanes, where the columns of
// a lane lie side by side, and adds the lanes in order: the same sums, the same bits.
#pragma once

#include "a32_avx512.h"

namespace qkern {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kLaneBlockRows = 96;  // rows per transposed chunk
static_assert(kStreamRows >= kLaneRows, "tiles need x_lanes");

// Codes of up to 4 bits of one output: 16 columns at a time, one per dword lane.
template <int BITS>
struct RowCodes {
  static constexpr int kLast = BITS & 1 ? 1 : BITS & 2 ? 2 : 4;
  static constexpr int kUnit = 128 / kLast;
  static constexpr int kBytes = kUnit * kHalf * BITS / 8;
  static constexpr int kSteps = kUnit / kLanes;

  // Columns 16 * step .. + 15 of a unit, `lane` being the byte offset of the output in a block: the
  // code in the lowest bits of each dword, anything above it.
  static __m512i step(const uint8_t* unit, int lane, int step) {
    __m512i codes = _mm512_setzero_si512();
    int shift = 0;
    for (int bits = 4; bits >= 1; bits >>= 1) {
      if (!(BITS & bits)) continue;
      const int block = step / (8 / bits), down = step % (8 / bits) * bits - shift;
      __m512i plane = _mm512_cvtepu8_epi32(
          _mm_loadu_si128((const __m128i*)(unit + 16 * kLanes * block + lane)));
      if (down > 0) plane = _mm512_srli_epi32(plane, (unsigned)down);
      if (down < 0) plane = _mm512_slli_epi32(plane, (unsigned)-down);
      const __m512i below = _mm512_set1_epi32((1 << shift) - 1);
      codes = shift ? _mm512_ternarylogic_epi32(below, codes, plane, 0xca) : plane;
      shift += bits;
      unit += kUnit * kHalf * bits / 8;
    }
    return codes;
  }

  // The 2^BITS entries of a table, repeated over the 16 that vpermps tells apart.
  static __m512 table(const float* entries) {
    if (BITS == 4) return _mm512_loadu_ps(entries);
    return BITS == 3 ? _mm512_broadcast_f32x8(_mm256_loadu_ps(entries))
                     : _mm512_broadcast_f32x4(_mm_loadu_ps(entries));
  }
};

// v[i] lane j -> v[j] lane i.
static inline void transpose_16x16(__m512 v[16]) {
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  // v[4i + j]: column 4l + j of rows 4i .. 4i + 3 in 16-byte lane l.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 2]);
    const __m512d c = _mm512_castps_pd(t[i + 1]), d = _mm512_castps_pd(t[i + 3]);
    v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    v[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    v[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    v[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even01 = _mm512_shuffle_f32x4(v[j], v[4 + j], 0x88);  // lanes 0, 2
    const __m512 odd01 = _mm512_shuffle_f32x4(v[j], v[4 + j], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// Tables of the outputs of a half in group `block`.
static inline const float* tables_of(const Packed& w, const uint8_t* panel, const uint8_t* block) {
  return (const float*)(w.head_bytes ? panel : block);
}

// ---- few rows: look up in registers ----

// Adds lane chains of `outputs` outputs from `first` on, R rows: columns [0, columns) of a chunk.
template <class Codes, int R, int O>
void lane_chains(const uint8_t* codes, const float* tables, int64_t table_stride, int first,
                 const float* const* x_rows, int64_t columns, float* lanes) {
  __m512 table[O], s[R][O];
  int at[O];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
    table[o] = Codes::table(tables + (first + o) * table_stride);
    at[o] = lane_offset(Lanes::kRow, first + o);
    for (int r = 0; r < R; ++r) s[r][o] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < columns; k += Codes::kUnit, codes += Codes::kBytes) {
    for (int line = 0; line < Codes::kBytes; line += 64)
      _mm_prefetch((const char*)codes + kPrefetch + line, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int step = 0; step < Codes::kSteps; ++step) {
      __m512 x[R];
      for (int r = 0; r < R; ++r) x[r] = _mm512_loadu_ps(x_rows[r] + k + kLanes * step);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) {
        const __m512 value = _mm512_permutexvar_ps(Codes::step(codes, at[o], step), table[o]);
        for (int r = 0; r < R; ++r) s[r][o] = _mm512_fmadd_ps(x[r], value, s[r][o]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o)
      _mm512_store_ps(lanes + (r * kHalf + first + o) * kLanes, s[r][o]);
}

// ((s_0 + s_1) + ...) + s_15 of 16 outputs.
static inline __m512 fold_lanes(const float* lanes) {
  __m512 v[16];
  for (int i = 0; i < 16; ++i) v[i] = _mm512_load_ps(lanes + 16 * i);
  transpose_16x16(v);
  __m512 sum = v[0];
  for (int i = 1; i < 16; ++i) sum = _mm512_add_ps(sum, v[i]);
  return sum;
}

template <class Codes, int R>
void stream_rows(const LinearJob& job, int64_t m0, int64_t p) {
  constexpr int kAtOnce = R <= 2 ? 8 : 4;  // outputs whose tables and chains fit the registers
  const Packed& w = *job.w;
  const uint8_t* panel = w.panel(p);
  alignas(64) float lanes[R * kHalf * kLanes];
  __m512 acc[R];
  for (int r = 0; r < R; ++r) acc[r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g) {
    const uint8_t* block = w.group_block(panel, g, 1);
    const __m512 scale = scales_f32x16(w, w.scales_of(block, g, 1));
    const float* tables = tables_of(w, panel, block);
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t k = 0; k < padded; k += kFloatChunk) {
      const float* x_rows[R];
      for (int r = 0; r < R; ++r)
        x_rows[r] = job.x + (m0 + r) * job.x_stride + g * w.group_padded + k;
      for (int first = 0; first < kHalf; first += kAtOnce)
        lane_chains<Codes, R, kAtOnce>(w.codes_of(block) + k / Codes::kUnit * Codes::kBytes, tables,
                                       w.table_bytes / 4, first, x_rows,
                                       min64(kFloatChunk, padded - k), lanes);
      for (int r = 0; r < R; ++r)
        acc[r] = _mm512_fmadd_ps(fold_lanes(lanes + r * kHalf * kLanes), scale, acc[r]);
    }
  }
  for (int r = 0; r < R; ++r) store_outputs(job, m0 + r, p * kHalf, acc[r]);
}

// ---- many rows: transpose to scratch, multiply by tiles ----

// Values of a chunk: [16 lanes][terms][count][16 outputs].
template <class Codes>
void transpose_chunk(const Packed& w, int64_t panel, int count, int64_t g, int64_t k0,
                     int64_t columns, float* values) {
  const int64_t terms = columns / kLanes, pitch = count * kHalf;
  for (int h = 0; h < count; ++h) {
    const uint8_t* base = w.panel(panel + h);
    const uint8_t* block = w.group_block(base, g, 1);
    const uint8_t* codes = w.codes_of(block) + k0 / Codes::kUnit * Codes::kBytes;
    const float* tables = tables_of(w, base, block);
    float* to = values + h * kHalf;
    for (int64_t k = 0; k < columns; k += Codes::kUnit, codes += Codes::kBytes)
#pragma GCC unroll 2
      for (int step = 0; step < Codes::kSteps; ++step, to += pitch) {
        __m512 v[16];
#pragma GCC unroll 16
        for (int o = 0; o < 16; ++o)
          v[o] = _mm512_permutexvar_ps(Codes::step(codes, lane_offset(Lanes::kRow, o), step),
                                       Codes::table(tables + o * (w.table_bytes / 4)));
        transpose_16x16(v);
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) _mm512_store_ps(to + l * terms * pitch, v[l]);
      }
  }
}

// Rows [m0, m0 + rows), rows <= kLaneBlockRows, times `count` halves from `panel` on.
template <class Codes>
void multiply_rows(const LinearJob& job, int64_t m0, int64_t rows, int64_t panel, int count) {
  const Packed& w = *job.w;
  alignas(64) float values[kFloatChunk * kTileOutputs];
  alignas(64) float sums[kLaneBlockRows * kTileOutputs];
  alignas(64) float acc[kLaneBlockRows * kTileOutputs];
  alignas(64) float scales[kTileOutputs];
  memset(acc, 0, sizeof(float) * (size_t)(rows * kTileOutputs));
  FloatTiles tiles = {};
  tiles.vectors = count;
  tiles.x_stride = job.x_lanes_stride;
  tiles.rows = rows;
  tiles.sums = sums;
  tiles.acc = acc;
  tiles.scales = scales;
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int h = 0; h < count; ++h)
      _mm512_store_ps(scales + kHalf * h, scales_f32x16(w, w.scales_of(w.group_block(
                                                               w.panel(panel + h), g, 1), g, 1)));
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t k = 0; k < padded; k += kFloatChunk) {
      const int64_t columns = min64(kFloatChunk, padded - k);
      transpose_chunk<Codes>(w, panel, count, g, k, columns, values);
      tiles.columns = columns / kLanes;
      for (int l = 0; l < kLanes; ++l) {
        tiles.weights = values + l * tiles.columns * count * kHalf;
        tiles.x = job.x_lanes + m0 * job.x_lanes_stride + g * w.group_padded + k + l * tiles.columns;
        tiles.fold = l > 0;
        tiles.finish = l == kLanes - 1;
        a32_tiles_avx512(tiles);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int h = 0; h < count; ++h)
      store_outputs(job, m0 + r, (panel + h) * kHalf,
                    _mm512_load_ps(acc + r * kTileOutputs + kHalf * h));
}

template <class Codes>
void linear_row(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if (m1 - m0 > kStreamRows) {
    for (int64_t p = p0; p < p1; p += 4)
      for (int64_t m = m0; m < m1; m += kLaneBlockRows)
        multiply_rows<Codes>(job, m, min64(kLaneBlockRows, m1 - m), p, (int)min64(4, p1 - p));
    return;
  }
  for (int64_t p = p0; p < p1; ++p) switch (m1 - m0) {
      case 1:
        stream_rows<Codes, 1>(job, m0, p);
        break;
      case 2:
        stream_rows<Codes, 2>(job, m0, p);
        break;
      case 3:
        stream_rows<Codes, 3>(job, m0, p);
        break;
      default:
        stream_rows<Codes, kStreamRows>(job, m0, p);
    }
}

}  // namespace
}  // namespace qkern
