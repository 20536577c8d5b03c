// SPDX-License-Identifier: Apache-2.0
// The chassis of the float linear kernels over row lanes (layout.h): a table per row or per group.
// AVX-512 F, BW, DQ, VL.
//
// A table serves one output only, so one vpermps looks up 16 columns of one output, and a sum holds
// the 16 lane chains of the contract. Register tile: up to 6 rows x 4 outputs, whose sums go to
// memory at the end of a chunk; a 16x16 transpose then lets 16 outputs fold their lanes at once.
// Cost per 16 columns and tile: 24 vfmadd231ps, 6 loads of x, 4 lookups (vpmovzxbd, shift for half
// of them, vpermps with the table in memory). Registers: 24 sums, 4 values, x, codes.
//
// Tried and lost: lanes transposed while looking up, so that the tile of the dword kernels runs
// them with outputs in lanes (the transpose costs 4 cycles per 16 weights: 60 % of peak at 16 rows,
// 79 % at 64). Of 4-bit codes, values decoded once (Intel, one thread, M = 256: 81 ms either way,
// of which 9 decode, 6 fold lanes and the rest is the tile, which L1 bounds at 86 % of peak and x
// from L2 at 75 %); four outputs for all rows before the next four, so that values stay in L1 (84
// ms); 3 rows x 8 outputs (102 ms: loads from L1 limit).
#pragma once

#include "a32_avx512.h"
#include "transpose_avx512.h"

namespace qkern {
namespace {

constexpr int kLanes = 16;
constexpr int kLaneTileRows = 6;
constexpr int kDecodedOutputs = 4;  // of a tile whose values are decoded before

// Codes of up to 4 bits of one output: 16 columns at a time, one per dword lane.
template <int BITS>
struct RowCodes {
  static constexpr int kLast = BITS & 1 ? 1 : BITS & 2 ? 2 : 4;
  static constexpr int kUnit = 128 / kLast;
  static constexpr int kBytes = kUnit * kHalf * BITS / 8;
  static constexpr int kSteps = kUnit / kLanes;
  // Rows from which a half is decoded once for all tiles, 0: never. It pays where planes have to be
  // joined (Intel, 4096 x 4096, 3 bits, one thread: M = 16 / 64 / 256 6.6 / 25.4 / 102 -> 6.2
  // / 19.9 / 79 ms, M = 8 3.4 -> 4.1); 4 bits gain nothing, 2 bits lose a tenth.
  static constexpr int kDecodedRows = BITS == 3 ? 13 : 0;

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

// The lane sums of R rows x O outputs, in registers.
template <int R, int O>
struct LaneSums {
  __m512 s[R][O];

  __attribute__((always_inline)) void clear() {
#pragma GCC unroll 24
    for (int i = 0; i < R * O; ++i) s[i / O][i % O] = _mm512_setzero_ps();
  }

  // 16 columns: the values v of O outputs times those of each row of x.
  __attribute__((always_inline)) void add(const __m512 (&v)[O], const float* x, int64_t x_stride) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512 x_r = _mm512_loadu_ps(x + r * x_stride);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) s[r][o] = _mm512_fmadd_ps(x_r, v[o], s[r][o]);
    }
  }

  __attribute__((always_inline)) void store(float* lanes, int first) const {
#pragma GCC unroll 24
    for (int i = 0; i < R * O; ++i)
      _mm512_store_ps(lanes + (i / O * kHalf + first + i % O) * kLanes, s[i / O][i % O]);
  }
};

// Columns [0, columns) of a chunk, R rows, outputs first .. first + O - 1 of a half: the 16 lane
// sums of each go to lanes[r][output][16]. `ahead`: bytes to what the next call of this half will
// read, of which this call fetches its share.
template <class Codes, int R, int O>
__attribute__((noinline)) void lane_chains(const uint8_t* codes, const float* tables,
                                           int64_t table_stride, int first, const float* x,
                                           int64_t x_stride, int64_t columns, int64_t ahead,
                                           float* lanes) {
  constexpr int kShare = Codes::kBytes * O / kHalf;
  alignas(64) float table[O][16];
  LaneSums<R, O> sums;
  for (int o = 0; o < O; ++o)
    _mm512_store_ps(table[o], Codes::table(tables + (first + o) * table_stride));
  sums.clear();
  // first is a multiple of O: its lanes lie at a fixed distance from the first one's.
  const uint8_t* unit = codes + first / 4 * 16;
  const uint8_t* fetch = codes + ahead + first / O * kShare;
  for (const float* end = x + columns; x != end; unit += Codes::kBytes, fetch += Codes::kBytes) {
    for (int line = 0; line < kShare; line += 64)
      _mm_prefetch((const char*)fetch + line, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int step = 0; step < Codes::kSteps; ++step, x += kLanes) {
      // Keeps tables and codes out of the registers that the sums need.
      if (R * O > 16) __atomic_signal_fence(__ATOMIC_ACQ_REL);
      __m512 v[O];
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o)
        v[o] = _mm512_permutexvar_ps(Codes::step(unit, lane_offset(Lanes::kRow, o), step),
                                     _mm512_load_ps(table[o]));
      sums.add(v, x, x_stride);
    }
  }
  sums.store(lanes, first);
}

// The same in two steps. First the values of 16 outputs, [4][columns / 16][4 outputs][16 columns].
template <class Codes>
void decode_half(const uint8_t* codes, const float* tables, int64_t table_stride, int64_t columns,
                 int64_t ahead, float* values) {
  for (int first = 0; first < kHalf; first += kDecodedOutputs) {
    __m512 table[kDecodedOutputs];
#pragma GCC unroll 4
    for (int o = 0; o < kDecodedOutputs; ++o)
      table[o] = Codes::table(tables + (first + o) * table_stride);
    const uint8_t* unit = codes + first / 4 * 16;
    for (int64_t k = 0; k < columns; k += Codes::kUnit, unit += Codes::kBytes) {
      for (int line = 0; line < Codes::kBytes / 4; line += 64)
        _mm_prefetch((const char*)codes + ahead + k / Codes::kUnit * Codes::kBytes +
                         first / kDecodedOutputs * Codes::kBytes / 4 + line,
                     _MM_HINT_T1);
#pragma GCC unroll 8
      for (int step = 0; step < Codes::kSteps; ++step)
#pragma GCC unroll 4
        for (int o = 0; o < kDecodedOutputs; ++o, values += kLanes)
          _mm512_store_ps(
              values, _mm512_permutexvar_ps(Codes::step(unit, lane_offset(Lanes::kRow, o), step),
                                            table[o]));
    }
  }
}

// Then, for R rows, the lane sums of four outputs from `first` on.
template <int R>
__attribute__((noinline)) void lane_chains_decoded(const float* values, int first, const float* x,
                                                   int64_t x_stride, int64_t columns,
                                                   float* lanes) {
  constexpr int O = kDecodedOutputs;
  LaneSums<R, O> sums;
  sums.clear();
  values += first * columns;
  for (const float* end = x + columns; x != end; x += kLanes, values += O * kLanes) {
    __m512 v[O];
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) v[o] = _mm512_load_ps(values + o * kLanes);
    sums.add(v, x, x_stride);
  }
  sums.store(lanes, first);
}

// ((s_0 + s_1) + ...) + s_15 of 16 outputs.
static inline __m512 fold_lanes(const float* lanes) {
  __m512i v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(lanes + 16 * i);
  transpose_16x16(v);
  __m512 sum = _mm512_castsi512_ps(v[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 16; ++i) sum = _mm512_add_ps(sum, _mm512_castsi512_ps(v[i]));
  return sum;
}

// One chunk of one half.
struct Chunk {
  const uint8_t* codes;
  const float* tables;
  int64_t table_stride;  // floats
  int64_t columns;
  int64_t ahead;
  const float* x;  // row 0
  int64_t x_stride;
  __m512 scale;
  float* acc;           // [rows][kTileOutputs]: 16 outputs of each row
  const float* values;  // decoded, or NULL
};

template <class Codes, int R>
void multiply_chunk(const Chunk& c, int64_t row) {
  constexpr int kAtOnce = R <= 2 ? 8 : 4;
  alignas(64) float lanes[R * kHalf * kLanes];
  const float* x = c.x + row * c.x_stride;
  if (c.values) {
    for (int first = 0; first < kHalf; first += kDecodedOutputs)
      lane_chains_decoded<R>(c.values, first, x, c.x_stride, c.columns, lanes);
  } else {
    for (int first = 0; first < kHalf; first += kAtOnce)
      lane_chains<Codes, R, kAtOnce>(c.codes, c.tables, c.table_stride, first, x, c.x_stride,
                                     c.columns, c.ahead, lanes);
  }
  for (int r = 0; r < R; ++r) {
    float* acc = c.acc + (row + r) * kTileOutputs;
    _mm512_store_ps(
        acc, _mm512_fmadd_ps(fold_lanes(lanes + r * kHalf * kLanes), c.scale, _mm512_load_ps(acc)));
  }
}

template <class Codes>
Chunk chunk_of(const LinearJob& job, int64_t m0, const uint8_t* panel, int64_t g, int64_t k) {
  const Packed& w = *job.w;
  const uint8_t* block = w.group_block(panel, g, 1);
  Chunk c = {};
  c.codes = w.codes_of(block) + k / Codes::kUnit * Codes::kBytes;
  c.tables = (const float*)(w.head_bytes ? panel : block);
  c.table_stride = w.table_bytes / 4;
  c.columns = min64(kFloatChunk, w.group_columns_padded(g) - k);
  c.ahead = c.columns / Codes::kUnit * Codes::kBytes;
  c.x = job.x + m0 * job.x_stride + g * w.group_padded + k;
  c.x_stride = job.x_stride;
  c.scale = scales_f32x16(w, w.scales_of(block, g, 1));
  return c;
}

// Rows [m0, m0 + rows), rows <= kBlockRows, times `count` <= 4 halves from `panel` on. With
// `values`, room for 16 outputs x kFloatChunk columns, a half is decoded before its tiles.
template <class Codes>
void multiply_rows(const LinearJob& job, int64_t m0, int64_t rows, int64_t panel, int count,
                   float* values) {
  using Tile = void (*)(const Chunk&, int64_t);
  static constexpr Tile kTiles[kLaneTileRows] = {
      multiply_chunk<Codes, 1>, multiply_chunk<Codes, 2>, multiply_chunk<Codes, 3>,
      multiply_chunk<Codes, 4>, multiply_chunk<Codes, 5>, multiply_chunk<Codes, 6>};
  const Packed& w = *job.w;
  const int64_t tiles = ceil_div(rows, kLaneTileRows);
  alignas(64) float acc[kBlockRows * kTileOutputs];
  memset(acc, 0, sizeof(float) * (size_t)(rows * kTileOutputs));
  auto run = [&](Chunk& c, int64_t tile, int h) {
    const int64_t row = rows * tile / tiles;
    c.acc = acc + kHalf * h;
    c.values = values;
    kTiles[rows * (tile + 1) / tiles - row - 1](c, row);
  };
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t k = 0; k < padded; k += kFloatChunk) {
      if (values) {
        for (int h = 0; h < count; ++h) {
          Chunk c = chunk_of<Codes>(job, m0, w.panel(panel + h), g, k);
          decode_half<Codes>(c.codes, c.tables, c.table_stride, c.columns, c.ahead, values);
          for (int64_t i = 0; i < tiles; ++i) run(c, i, h);
        }
        continue;
      }
      for (int64_t i = 0; i < tiles; ++i)
        for (int h = 0; h < count; ++h) {
          Chunk c = chunk_of<Codes>(job, m0, w.panel(panel + h), g, k);
          run(c, i, h);
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
  // Several halves share a tile's rows of x; a single tile runs along the panels as they lie.
  const int64_t halves = m1 - m0 > kLaneTileRows ? kTileOutputs / kHalf : 1;
  const bool decodes =
      Codes::kDecodedRows && m1 - m0 >= Codes::kDecodedRows && decoding_takes_multiply_ports();
  alignas(64) float values[kHalf * kFloatChunk];
  for (int64_t p = p0; p < p1; p += halves)
    for (int64_t m = m0; m < m1; m += kBlockRows)
      multiply_rows<Codes>(job, m, min64(kBlockRows, m1 - m), p, (int)min64(halves, p1 - p),
                           decodes ? values : nullptr);
}

}  // namespace
}  // namespace qkern
