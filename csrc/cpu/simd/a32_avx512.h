// SPDX-License-Identifier: Apache-2.0
// The chassis of the float linear kernels over dword lanes (layout.h): AVX-512 F, BW, DQ, VL.
//
// A kernel brings a decoder: how the planes of a unit become bytes of codes ("quads": 4 columns of
// 16 outputs), and how byte j of every dword becomes the float32 value of the contract. The chassis
// brings the loops. Up to kFewRows rows: planes are decoded in registers, four panels in flight,
// each an address stream of its own. More rows: quads go to scratch (16 KiB, L1) and are multiplied
// by the tile of a32_tiles_avx512.cpp. Where decoding takes the ports of the multiplications, as on
// Intel's processors (7 operations beside 24), decoded floats go to scratch instead (32 KiB).
//
// The chain of an output runs over ascending columns and is never split, so rows, panels and
// outputs are what runs in parallel. Partial sums that go through memory keep their bits.
//
// Tried and lost at one row: loads at byte offsets 1 to 3 instead of shifts (twice the time from
// memory: they cross lines); prefetcht1 or no prefetch (20 % slower); panels whose distance is
// a multiple of 4 KiB (30 %: the four streams and x then share cache sets, see layout.h).
#pragma once

#include "../cpu_features.h"
#include "../kernels.h"
#include "a32_tiles.h"
#include "rows_avx512.h"

namespace qkern {
namespace {

constexpr int64_t kBlockRows = 48;  // whose activations stay in the second level of cache
constexpr int kPrefetch = 2048;     // bytes ahead in each stream

// ---- decoders ----

// Planes of codes of BITS bits to quads.
template <int BITS>
struct Codes {
  static constexpr int kLast = BITS & 1 ? 1 : BITS & 2 ? 2 : BITS & 4 ? 4 : 8;
  static constexpr int kUnit = 32 / kLast;
  static constexpr int kBytes = kUnit * kHalf * BITS / 8;  // of a unit of one half
  static constexpr int kFewRows = 4;                       // rows that are streamed
  static constexpr int kMostPanels = 4;                    // that one row streams at once
  static constexpr int kStoredSize = 1;                    // bytes of a weight that a tile reads
  static constexpr bool kQuads = false;                    // four columns are decoded at once
  static constexpr bool kOwnTables = false;                // a table for each half
  static constexpr int64_t kBlockBytes = 16384;            // of scratch: a multiple of every unit

  // Byte j of each dword: the code of column 4q + j in the lowest bits, anything above it.
  static __m512i quad(const uint8_t* unit, int q) {
    __m512i codes = _mm512_setzero_si512();
    int shift = 0;
    for (int bits = 8; bits >= 1; bits >>= 1) {
      if (!(BITS & bits)) continue;
      const int block = q / (8 / bits), down = q % (8 / bits) * bits - shift;
      __m512i plane = _mm512_loadu_si512(unit + 64 * block);
      if (down > 0) plane = _mm512_srli_epi32(plane, (unsigned)down);
      if (down < 0) plane = _mm512_slli_epi32(plane, (unsigned)-down);
      const __m512i below = _mm512_set1_epi8((char)((1 << shift) - 1));
      codes = shift ? _mm512_ternarylogic_epi32(below, codes, plane, 0xca) : plane;
      shift += bits;
      unit += kUnit * kHalf * bits / 8;
    }
    return codes;
  }
};

// Codes of up to 4 bits: one 16-entry table, which vpermps indexes with the lowest 4 bits.
template <int BITS>
struct LookUp : Codes<BITS> {
  static_assert(BITS <= 4, "the table is one register");
  __m512 table;

  explicit LookUp(const Packed& w) {
    const __m512i code =
        _mm512_and_si512(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32((1 << BITS) - 1));
    if (w.h.kind == QK_KIND_TABLE)
      table = _mm512_permutexvar_ps(code, _mm512_loadu_ps(w.table));
    else
      table = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(code_offset(w))));
  }
  __m512 group_table(const uint8_t*) const { return table; }
  __m512 value(__m512i quad, int j, __m512 entries) const {
    const __m512i code = j ? _mm512_srli_epi32(quad, (unsigned)(8 * j)) : quad;
    return _mm512_permutexvar_ps(code, entries);
  }
  void store(__m512i quad, uint8_t* to, int64_t, __m512) const { _mm512_store_si512(to, quad); }
  void describe(float* entries, FloatTiles* tiles) const {
    _mm512_store_ps(entries, table);
    tiles->kind = TileWeights::kEntries;
    tiles->table = entries;
  }
};

// Tables per tile: the two tables of a half are one register of 16 entries. Bit 3 of a code, which
// is another column's, becomes the number of the table.
struct TileLookUp : Codes<3> {
  static constexpr bool kOwnTables = true;
  __m512i second;  // 8 in every byte of outputs 8..15

  explicit TileLookUp(const Packed&) : second(_mm512_maskz_set1_epi32(0xff00, 0x08080808)) {}
  __m512i quad(const uint8_t* unit, int q) const {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(8), second, Codes<3>::quad(unit, q), 0xca);
  }
  __m512 group_table(const uint8_t* tables) const {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tables)));
  }
  __m512 value(__m512i quad, int j, __m512 entries) const {
    const __m512i code = j ? _mm512_srli_epi32(quad, (unsigned)(8 * j)) : quad;
    return _mm512_permutexvar_ps(code, entries);
  }
  void store(__m512i quad, uint8_t* to, int64_t, __m512) const { _mm512_store_si512(to, quad); }
  void describe(float* entries, FloatTiles* tiles) const {
    tiles->kind = TileWeights::kOwnEntries;
    tiles->table = entries;
  }
};

// Integer codes of any width: the code becomes the low mantissa bits of 2^23, and 2^23 + offset is
// subtracted, which is exact.
template <int BITS>
struct Integer : Codes<BITS> {
  int offset;
  __m512 base;

  explicit Integer(const Packed& w)
      : offset(code_offset(w)), base(_mm512_set1_ps(0x1p23f + (float)offset)) {}
  __m512 group_table(const uint8_t*) const { return base; }  // of no use
  __m512 value(__m512i quad, int j, __m512) const {
    const __m512i code = j ? _mm512_srli_epi32(quad, (unsigned)(8 * j)) : quad;
    const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1);
    const __m512i magic = _mm512_set1_epi32(0x4b000000);
    return _mm512_sub_ps(_mm512_castsi512_ps(_mm512_ternarylogic_epi32(code, mask, magic, 0xea)),
                         base);
  }
  // What the tile reads: the values as bytes.
  void store(__m512i quad, uint8_t* to, int64_t, __m512) const {
    const __m512i mask = _mm512_set1_epi8((char)((1 << BITS) - 1));
    _mm512_store_si512(
        to, _mm512_sub_epi8(_mm512_and_si512(quad, mask), _mm512_set1_epi8((char)offset)));
  }
  void describe(float*, FloatTiles* tiles) const {
    tiles->kind = offset ? TileWeights::kSigned : TileWeights::kUnsigned;
  }
};

// The same with values that are float32 before they meet the rows. Zen 4 shifts and permutes on
// other ports than it multiplies and loses 2 to 8 % so; an Intel core wins 10 to 14 % (4096 x 4096,
// int4-g128, one thread: M = 16 / 64 / 256 4.52 / 16.4 / 66.6 ms with bytes, 4.10 / 14.8 / 58.1
// so).
template <class Decoder>
struct Decoded : Decoder {
  static constexpr int kStoredSize = 4;
  static constexpr int64_t kBlockBytes = 32768;

  explicit Decoded(const Decoder& decoder) : Decoder(decoder) {}
  void store(__m512i quad, uint8_t* to, int64_t column_bytes, __m512 entries) const {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      _mm512_store_ps(to + j * column_bytes, this->value(quad, j, entries));
  }
  void describe(float*, FloatTiles* tiles) const { tiles->kind = TileWeights::kFloats; }
};

// ---- scales, zeros, outputs ----

// scale * table_scale of one half.
static inline __m512 scales_f32x16(const Packed& w, const uint8_t* scales) {
  const __m512 factor = _mm512_set1_ps(w.h.table_scale);
  return w.scale_bytes ? _mm512_mul_ps(load_f32x16(scales, w.h.scale_stored), factor) : factor;
}

static inline __m512 minus_zeros_f32x16(const Packed& w, const uint8_t* zeros) {
  return _mm512_xor_ps(load_f32x16(zeros, w.h.zero_stored), _mm512_set1_ps(-0.f));
}

// Adds the bias and stores outputs n0 .. n0 + 15 of a row.
static inline void store_outputs(const LinearJob& job, int64_t row, int64_t n0, __m512 acc) {
  const __mmask16 lanes = first_lanes(job.w->h.n - n0);
  if (job.bias) acc = _mm512_add_ps(acc, _mm512_maskz_loadu_ps(lanes, job.bias + n0));
  store_some_f32x16(job.y, job.y_dtype, row * job.y_stride + n0, lanes, acc);
}

// ---- few rows: decode in registers ----

// R rows times P panels of H halves; the panels are `step` apart.
template <class Decoder, int R, int P, int H>
void stream(const LinearJob& job, const Decoder& decoder, int64_t m0, int64_t panel, int64_t step) {
  constexpr int V = P * H;
  const Packed& w = *job.w;
  const float* x_rows[R];
  for (int r = 0; r < R; ++r) x_rows[r] = job.x + (m0 + r) * job.x_stride;
  const uint8_t* codes[P];
  for (int p = 0; p < P; ++p) codes[p] = w.panel(panel + p * step);
  __m512 acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t padded = w.group_columns_padded(g);
    const int64_t scales_at = (g + 1 < w.groups ? w.code_bytes : w.last_code_bytes) * H;
    const uint8_t* scales[P];
    for (int p = 0; p < P; ++p) {
      scales[p] = codes[p] + scales_at;
      _mm_prefetch((const char*)scales[p] + kPrefetch, _MM_HINT_T0);
    }
    __m512 tables[V];
    for (int v = 0; v < V; ++v)
      tables[v] = decoder.group_table(scales[v / H] + H * (w.scale_bytes + w.zero_bytes) +
                                      v % H * w.tile_table_bytes);
    for (int64_t k0 = 0, chunk = 0; k0 < padded; k0 += kFloatChunk, ++chunk) {
      const int64_t begin = g * w.group_padded + k0;
      const int64_t end = begin + min64(kFloatChunk, padded - k0);
      __m512 s[R][V];
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) s[r][v] = _mm512_setzero_ps();
      for (int64_t k = begin; k < end; k += Decoder::kUnit) {
#pragma GCC unroll 8
        for (int q = 0; q < Decoder::kUnit / 4; ++q) {
          __m512i quads[V];
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v)
            quads[v] = decoder.quad(codes[v / H] + v % H * Decoder::kBytes, q);
          if constexpr (Decoder::kQuads) {
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
              __m512 values[4];
              decoder.values(quads[v], values);
#pragma GCC unroll 4
              for (int j = 0; j < 4; ++j)
                for (int r = 0; r < R; ++r)
                  s[r][v] =
                      _mm512_fmadd_ps(_mm512_set1_ps(x_rows[r][k + 4 * q + j]), values[j], s[r][v]);
            }
          } else {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
              __m512 x[R];
              for (int r = 0; r < R; ++r) x[r] = _mm512_set1_ps(x_rows[r][k + 4 * q + j]);
#pragma GCC unroll 8
              for (int v = 0; v < V; ++v) {
                const __m512 value = decoder.value(quads[v], j, tables[v]);
                for (int r = 0; r < R; ++r) s[r][v] = _mm512_fmadd_ps(x[r], value, s[r][v]);
              }
            }
          }
        }
        for (int p = 0; p < P; ++p) {
          for (int line = 0; line < H * Decoder::kBytes; line += 64)
            _mm_prefetch((const char*)codes[p] + kPrefetch + line, _MM_HINT_T0);
          codes[p] += H * Decoder::kBytes;
        }
      }
      for (int v = 0; v < V; ++v) {
        const uint8_t* at = scales[v / H];
        const __m512 scale = scales_f32x16(w, at + v % H * w.scale_bytes);
        if (w.zero_bytes) {
          const __m512 minus_zero =
              minus_zeros_f32x16(w, at + H * w.scale_bytes + v % H * w.zero_bytes);
          for (int r = 0; r < R; ++r)
            s[r][v] = _mm512_fmadd_ps(
                minus_zero,
                _mm512_set1_ps(job.x_sum[(m0 + r) * job.chunks + g * job.chunks_per_group + chunk]),
                s[r][v]);
        }
        for (int r = 0; r < R; ++r) acc[r][v] = _mm512_fmadd_ps(s[r][v], scale, acc[r][v]);
      }
    }
    for (int p = 0; p < P; ++p)
      codes[p] = scales[p] + H * (w.scale_bytes + w.zero_bytes + w.tile_table_bytes);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      store_outputs(job, m0 + r, ((panel + v / H * step) * 2 + v % H) * kHalf, acc[r][v]);
}

// All panels: as many at a time as registers allow, far apart so that each is its own stream.
template <class Decoder, int R>
void stream_panels(const LinearJob& job, const Decoder& decoder, int64_t m0, int64_t p0,
                   int64_t p1) {
  constexpr int kAtOnce = R == 1 ? Decoder::kMostPanels : 2;
  if (p0 < p1 && job.w->halves_of(p1 - 1) == 1) stream<Decoder, R, 1, 1>(job, decoder, m0, --p1, 0);
  // An odd step (layout.h spreads panels over the cache for that).
  const int64_t most = (p1 - p0) / kAtOnce, step = most - (most > 1 && most % 2 == 0);
  for (int64_t p = p0; p < p0 + step; ++p)
    stream<Decoder, R, kAtOnce, 2>(job, decoder, m0, p, step);
  p0 += kAtOnce * step;
  if (p1 - p0 >= kAtOnce) {
    stream<Decoder, R, kAtOnce, 2>(job, decoder, m0, p0, 1);
    p0 += kAtOnce;
  }
  if (kAtOnce > 2 && p1 - p0 >= 2) {
    stream<Decoder, R, 2, 2>(job, decoder, m0, p0, 1);
    p0 += 2;
  }
  for (; p0 < p1; ++p0) stream<Decoder, R, 1, 2>(job, decoder, m0, p0, 0);
}

// ---- many rows: planes to bytes of codes, multiplied by tiles ----

// The halves of two neighbouring panels, and their share of a group.
struct Halves {
  int count;  // 1..4
  const uint8_t* units[4];
  int64_t unit_stride[4];  // bytes from a unit of this half to its next
  alignas(64) float scales[kTileOutputs];
  alignas(64) float minus_zeros[kTileOutputs];
  alignas(64) float tables[kTileOutputs];  // the shared table, or 16 entries for each half
};

template <class Decoder>
void find_group(const Decoder& decoder, const Packed& w, int64_t panel, int64_t g, Halves* halves) {
  constexpr int64_t kBytes = Decoder::kBytes;
  for (int v = 0; v < halves->count; ++v) {
    const int64_t p = panel + v / 2;
    const int c = w.halves_of(p), half = v % 2;
    const uint8_t* block = w.group_block(w.panel(p), g, c);
    halves->units[v] = w.codes_of(block) + half * kBytes;
    halves->unit_stride[v] = c * kBytes;
    if (w.tile_table_bytes)
      _mm512_store_ps(halves->tables + 16 * v,
                      decoder.group_table(w.half_tables(w.panel(p), g, c, half)));
    _mm512_store_ps(halves->scales + 16 * v,
                    scales_f32x16(w, w.scales_of(block, g, c) + half * w.scale_bytes));
    if (w.zero_bytes)
      _mm512_store_ps(halves->minus_zeros + 16 * v,
                      minus_zeros_f32x16(w, w.zeros_of(block, g, c) + half * w.zero_bytes));
  }
}

// Columns that are decoded at a time.
template <class Decoder>
constexpr int64_t kBlockColumns = Decoder::kBlockBytes / kTileOutputs / Decoder::kStoredSize;

// What the tiles read of the next `columns` columns: [columns / 4][count][64] bytes, or floats. The
// block after them is fetched to the second level of cache, where it waits for the next call.
template <class Decoder>
void spread_codes(const Decoder& decoder, Halves* halves, int64_t columns, uint8_t* quads) {
  for (int v = 0; v < halves->count; ++v) {
    const uint8_t* unit = halves->units[v];
    const int64_t ahead = kBlockColumns<Decoder> / Decoder::kUnit * halves->unit_stride[v];
    uint8_t* to = quads + 64 * v;
    __m512 entries;
    if constexpr (Decoder::kOwnTables)
      entries = _mm512_load_ps(halves->tables + 16 * v);
    else
      entries = decoder.group_table(nullptr);
    for (int64_t k = 0; k < columns; k += Decoder::kUnit, unit += halves->unit_stride[v]) {
      for (int line = 0; line < Decoder::kBytes; line += 64)
        _mm_prefetch((const char*)unit + ahead + line, _MM_HINT_T1);
#pragma GCC unroll 8
      for (int q = 0; q < Decoder::kUnit / 4; ++q, to += 64 * halves->count * Decoder::kStoredSize)
        decoder.store(decoder.quad(unit, q), to, 64 * halves->count, entries);
    }
    halves->units[v] = unit;
  }
}

// Rows [m0, m0 + rows), rows <= kBlockRows, times two panels from `panel` on.
template <class Decoder>
void multiply_block(const LinearJob& job, const Decoder& decoder, int64_t m0, int64_t rows,
                    int64_t panel, int count) {
  const Packed& w = *job.w;
  constexpr int64_t kColumns = kBlockColumns<Decoder>;
  alignas(64) uint8_t quads[Decoder::kBlockBytes];
  alignas(64) float sums[kBlockRows * kTileOutputs];
  alignas(64) float acc[kBlockRows * kTileOutputs];
  memset(acc, 0, sizeof(float) * (size_t)(rows * kTileOutputs));
  Halves halves;
  halves.count = count;
  FloatTiles tiles = {};
  decoder.describe(halves.tables, &tiles);
  tiles.weights = quads;
  tiles.vectors = count;
  tiles.x_stride = job.x_stride;
  tiles.rows = rows;
  tiles.sums = sums;
  tiles.acc = acc;
  tiles.scales = halves.scales;
  tiles.minus_zeros = w.zero_bytes ? halves.minus_zeros : nullptr;
  tiles.x_sum_stride = job.chunks;
  for (int64_t g = 0; g < w.groups; ++g) {
    find_group(decoder, w, panel, g, &halves);
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t k = 0; k < padded; k += kColumns) {
      tiles.columns = min64(kColumns, padded - k);
      spread_codes(decoder, &halves, tiles.columns, quads);
      tiles.x = job.x + m0 * job.x_stride + g * w.group_padded + k;
      tiles.resume = k % kFloatChunk != 0;
      tiles.finish = (k + kColumns) % kFloatChunk == 0 || k + kColumns >= padded;
      if (w.zero_bytes)
        tiles.x_sum = job.x_sum + m0 * job.chunks + g * job.chunks_per_group + k / kFloatChunk;
      a32_tiles_avx512(tiles);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < count; ++v)
      store_outputs(job, m0 + r, (panel * 2 + v) * kHalf,
                    _mm512_load_ps(acc + r * kTileOutputs + 16 * v));
}

template <class Decoder>
void multiply_panels(const LinearJob& job, const Decoder& decoder, int64_t m0, int64_t m1,
                     int64_t p0, int64_t p1) {
  for (int64_t p = p0; p < p1; p += 2) {
    const int count = job.w->halves_of(p) + (p + 1 < p1 ? job.w->halves_of(p + 1) : 0);
    for (int64_t m = m0; m < m1; m += kBlockRows)
      multiply_block(job, decoder, m, min64(kBlockRows, m1 - m), p, count);
  }
}

template <class Decoder>
void linear_dword(const LinearJob& job, const Decoder& decoder, int64_t m0, int64_t m1, int64_t p0,
                  int64_t p1) {
  if (m1 - m0 == 1) return stream_panels<Decoder, 1>(job, decoder, m0, p0, p1);
  if constexpr (Decoder::kFewRows == 4) {
    if (m1 - m0 == 2) return stream_panels<Decoder, 2>(job, decoder, m0, p0, p1);
    if (m1 - m0 == 3) return stream_panels<Decoder, 3>(job, decoder, m0, p0, p1);
    if (m1 - m0 == 4) return stream_panels<Decoder, 4>(job, decoder, m0, p0, p1);
  }
  if constexpr (Decoder::kStoredSize == 1)
    if (decoding_takes_multiply_ports())
      return multiply_panels(job, Decoded<Decoder>(decoder), m0, m1, p0, p1);
  multiply_panels(job, decoder, m0, m1, p0, p1);
}

}  // namespace
}  // namespace qkern
