// SPDX-License-Identifier: Apache-2.0
// The chassis of all int8-activation linear kernels for AVX-512, with or without VNNI. A kernel is
// this header and a choice of codes (a8_codes_avx512.h).
//
// Few rows stream the weights (a8_stream_avx512.h). From kStreamRows on, a piece of columns of 32
// outputs is unpacked to bytes once per block of rows, [k / 4][2][64] in the first-level cache, and
// register tiles (a8_tile_avx512.h) run over it; 8-bit Int already lies so. Integers commute within
// a chunk, so both ways give the same bits; the float32 steps per chunk are those of kernels.h.
#pragma once

#include "a8_stream_avx512.h"

namespace qkern {
namespace {

constexpr int kBlockRows = 48;          // rows that share an unpacked piece
constexpr int64_t kPiece = 512;         // columns of scratch (16 KiB); whole units
constexpr int64_t kDirectPiece = 1024;  // columns where packed bytes are used as they are
constexpr int kSegments = 32;           // chunks that a piece may touch

// A half of a panel and its first output.
struct HalfAt {
  const uint8_t* panel;
  int half, halves;
  int64_t n0;
};

// Columns of one chunk inside a piece.
struct Segment {
  const uint8_t* weights;
  int64_t steps, chunk;
  bool first, last;  // of the chunk
};

// A block of up to kBlockRows rows times up to two halves.
template <class Codes>
struct Block {
  static constexpr int kPanels = kVectors / Codes::kPanelHalves;

  const LinearJob& job;
  const Codes& codes;
  HalfAt halves[kVectors];
  int count;                                   // of halves
  bool direct;                                 // packed bytes are used where they lie
  int64_t m0, tiles, tile_rows, larger_tiles;  // the first tiles have a row more
  // The piece at hand: from column k0 (packed), and what lies behind it in each panel.
  Segment segments[kSegments];
  int segment_count;
  int64_t k0, columns, ahead_step;
  const uint8_t *begin[kPanels], *end[kPanels];
  alignas(64) uint8_t scratch[kPiece * kHalf * kVectors];
  alignas(64) float scales[kSegments][kVectors][kHalf];
  alignas(64) float negative_zeros[kSegments][kVectors][kHalf];
  alignas(64) float acc[kBlockRows][kVectors][kHalf];
  alignas(64) int32_t sums[kBlockRows][kVectors][kHalf];  // of a chunk that spans pieces

  // Halves [h0, h1) of the weight. A vector beyond repeats the first half; nobody stores it.
  Block(const LinearJob& j, const Codes& c, int64_t h0, int64_t h1)
      : job(j), codes(c), count((int)(h1 - h0)), direct(Codes::kPlain && count == kVectors) {
    const Packed& w = *job.w;
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t h = v < count ? h0 + v : h0, p = h / Codes::kPanelHalves;
      halves[v] = {w.panel(p), (int)(h % Codes::kPanelHalves), w.halves_of(p), h * kHalf};
    }
  }

  const uint8_t* unit_of(const HalfAt& at, int64_t g, int64_t k) const {
    const Packed& w = *job.w;
    const uint8_t* group_codes = w.codes_of(w.group_block(at.panel, g, at.halves));
    return group_codes + (k / Codes::kUnit * at.halves + at.half) * Codes::kUnitBytes;
  }

  // Columns [k, k + length) of group g to `to`.
  void unpack(int64_t g, int64_t k, int64_t length, uint8_t* to) const {
    const uint8_t* units[kVectors];
    const uint8_t* tables[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const HalfAt& at = halves[v];
      units[v] = unit_of(at, g, k);
      tables[v] = job.w->half_tables(at.panel, g, at.halves, at.half);
    }
    if constexpr (!Codes::kStreamed) {
      for (int v = 0; v < kVectors; ++v)
        codes.unpack(units[v], tables[v], length, to + 64 * v, 64 * kVectors);
      return;
    }
    for (int64_t i = 0; i < length; i += Codes::kUnit) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        __m512i parts[Codes::kHalfVectors][Codes::kParts];
#pragma GCC unroll 4
        for (int j = 0; j < Codes::kHalfVectors; ++j) codes.load(units[v], j, tables[v], parts[j]);
#pragma GCC unroll 8
        for (int part = 0; part < Codes::kParts; ++part) {
          __m512i bytes[Codes::kHalfVectors];
#pragma GCC unroll 4
          for (int j = 0; j < Codes::kHalfVectors; ++j) bytes[j] = parts[j][part];
          if constexpr (Codes::kHalfVectors == 4) transpose_dwords(bytes);
#pragma GCC unroll 4
          for (int j = 0; j < Codes::kHalfVectors; ++j)
            _mm512_store_si512(to + 64 * (kVectors * (part * Codes::kHalfVectors + j) + v),
                               bytes[j]);
        }
        units[v] += Codes::kUnitBytes * halves[v].halves;
      }
      to += 64 * kVectors * Codes::kParts * Codes::kHalfVectors;
    }
  }

  void load_terms(int64_t g, int segment) {
    const Packed& w = *job.w;
    for (int v = 0; v < kVectors; ++v) {
      const HalfAt& at = halves[v];
      const uint8_t* block = w.group_block(at.panel, g, at.halves);
      _mm512_store_ps(scales[segment][v], load_scales(w, block, g, at.half, at.halves));
      if (w.zero_bytes)
        _mm512_store_ps(negative_zeros[segment][v],
                        load_negative_zeros(w, block, g, at.half, at.halves));
    }
  }

  // The float32 steps of a chunk for the rows of a tile.
  template <int kRows>
  void add_chunk(int64_t m, int index, const __m512i (&tile)[kRows][kVectors],
                 __m512 (&to)[kRows][kVectors]) const {
    const Packed& w = *job.w;
    const int64_t at = m * job.chunks + segments[index].chunk, stride = job.chunks;
    __m512 t[kRows][kVectors], scale[kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) t[r][v] = _mm512_cvtepi32_ps(tile[r][v]);
    if (w.zero_bytes) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512 x_sum = _mm512_set1_ps(job.x_sum[at + r * stride]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          t[r][v] = _mm512_fmadd_ps(_mm512_load_ps(negative_zeros[index][v]), x_sum, t[r][v]);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) scale[v] = _mm512_load_ps(scales[index][v]);
    if (w.h.activations == QK_ACT_INT8_GROUP) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512 x_scale = _mm512_set1_ps(job.q_scale[at + r * stride]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          to[r][v] = _mm512_fmadd_ps(t[r][v], _mm512_mul_ps(scale[v], x_scale), to[r][v]);
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) to[r][v] = _mm512_fmadd_ps(t[r][v], scale[v], to[r][v]);
    }
  }

  // The piece for kRows rows from row `row` of the block: tile number `index`. What it needs is
  // read from the block field by field: a struct copied right after its fields were written waits
  // for all stores before (no forwarding), a tenth of the time of a tile.
  template <int kRows>
  static void run_tile(Block& b, int64_t row, int64_t index) {
    const int64_t m = b.m0 + row, chunks = b.job.chunks;
    TileInput in;
    in.x_stride = b.job.q_stride;
    in.x = b.job.q + m * in.x_stride + b.k0;
    in.stride = b.direct ? 2 * Codes::kUnitBytes : 64 * kVectors;
    in.ahead_step = b.ahead_step;
    for (int p = 0; p < kPanels; ++p)
      in.ahead[p] =
          reinterpret_cast<const char*>(b.end[p]) + index * (b.columns / 4) * b.ahead_step;
    float (*acc)[kVectors][kHalf] = b.acc + row;
    int32_t (*sums)[kVectors][kHalf] = b.sums + row;
    __m512 total[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) total[r][v] = _mm512_load_ps(acc[r][v]);
    for (int i = 0; i < b.segment_count; ++i) {
      const Segment& s = b.segments[i];
      const int32_t* init = b.job.q_init + m * chunks + s.chunk;
      __m512i tile[kRows][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          tile[r][v] =
              s.first ? _mm512_set1_epi32(init[r * chunks]) : _mm512_load_si512(sums[r][v]);
      in.weights = s.weights;
      in.steps = s.steps;
      sum_tile<Codes::kLargest, kPanels>(in, tile);
      in.x += 4 * s.steps;
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) in.ahead[p] += s.steps * in.ahead_step;
      if (s.last) {
        b.template add_chunk<kRows>(m, i, tile, total);
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) _mm512_store_si512(sums[r][v], tile[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) _mm512_store_ps(acc[r][v], total[r][v]);
  }

  // The piece for all rows; together the tiles fetch as much as it has bytes behind it.
  void run_piece() {
    using Tile = void (*)(Block&, int64_t, int64_t);
    static constexpr Tile kTiles[kTileRows] = {run_tile<1>, run_tile<2>, run_tile<3>,
                                               run_tile<4>, run_tile<5>, run_tile<6>};
    // What unpacks a piece at once also fetches: a second reader of the same lines only stalls.
    ahead_step = Codes::kStreamed ? (end[0] - begin[0]) / (tiles * (columns / 4)) + 1 : 0;
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
      const int64_t rows = tile_rows + (i < larger_tiles);
      kTiles[rows - 1](*this, row, i);
      row += rows;
    }
    k0 += columns;
    columns = 0;
    segment_count = 0;
  }

  // Adds columns [k, k + length) of group g to the piece.
  void add_segment(int64_t g, int64_t k, int64_t length, int64_t chunk, bool first, bool last) {
    Segment& s = segments[segment_count];
    s = {direct ? unit_of(halves[0], g, k) : scratch + columns * kHalf * kVectors, length / 4,
         chunk, first, last};
    for (int p = 0; p < kPanels; ++p) {
      const HalfAt& at = halves[p * Codes::kPanelHalves];
      const uint8_t* unit = unit_of(at, g, k);
      if (segment_count == 0) begin[p] = unit;
      end[p] = unit + length * kHalf * Codes::kBits / 8 * at.halves;
    }
    if (!direct) unpack(g, k, length, scratch + columns * kHalf * kVectors);
    if (last) load_terms(g, segment_count);
    ++segment_count;
    columns += length;
  }

  void run(int64_t first_row, int64_t rows) {
    const Packed& w = *job.w;
    memset(acc, 0, sizeof acc[0] * (size_t)rows);
    m0 = first_row;
    tiles = ceil_div(rows, kTileRows);
    tile_rows = rows / tiles;
    larger_tiles = rows % tiles;
    k0 = columns = 0;
    segment_count = 0;
    const int64_t longest = direct ? kDirectPiece : kPiece;
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t padded = w.group_columns_padded(g);
      for (int64_t c = 0; c * job.chunk < padded; ++c) {
        const int64_t chunk_begin = c * job.chunk,
                      chunk_end = min64(padded, chunk_begin + job.chunk);
        for (int64_t k = chunk_begin; k < chunk_end; k += longest) {
          const int64_t length = min64(longest, chunk_end - k);
          if (columns + length > longest || segment_count == kSegments) run_piece();
          add_segment(g, k, length, g * job.chunks_per_group + c, k == chunk_begin,
                      k + length == chunk_end);
        }
      }
    }
    run_piece();
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < count; ++v)
        store_outputs(job, _mm512_load_ps(acc[r][v]), m0 + r, halves[v].n0);
  }
};

// Rows [m0, m1) of one row or two of halves.
template <class Codes>
void compute_block(const LinearJob& job, const Codes& codes, int64_t m0, int64_t m1, int64_t h0,
                   int64_t h1) {
  Block<Codes> block(job, codes, h0, h1);
  const int64_t rows = m1 - m0, blocks = ceil_div(rows, kBlockRows);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = rows * i / blocks;
    block.run(m0 + begin, rows * (i + 1) / blocks - begin);
  }
}

// Rows [m0, m1) of as many panels as make whole groups of streams; returns the first panel left.
template <class Codes, int kRows>
int64_t stream_range(const LinearJob& job, const Codes& codes, int64_t m0, int64_t p0, int64_t p1) {
  const Packed& w = *job.w;
  const int64_t whole = p1 - (w.halves_of(p1 - 1) < w.panel_halves);
  const int64_t length = (whole - p0) / kStreams;
  for (int64_t p = p0; p < p0 + length; ++p)
    stream_panels<Codes, kRows>(job, codes, m0, {p, p + length, p + 2 * length, p + 3 * length});
  return p0 + kStreams * length;
}

// The whole kernel: rows [m0, m1) of panels [p0, p1).
template <class Codes>
inline void linear_a8(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if (m0 >= m1 || p0 >= p1) return;
  const Packed& w = *job.w;
  const Codes codes(w);
  if constexpr (Codes::kStreamed) {
    if (m1 - m0 == 1) p0 = stream_range<Codes, 1>(job, codes, m0, p0, p1);
    if (m1 - m0 == 2) p0 = stream_range<Codes, 2>(job, codes, m0, p0, p1);
    if (m1 - m0 == 3) p0 = stream_range<Codes, 3>(job, codes, m0, p0, p1);
    if (m1 - m0 == 4) p0 = stream_range<Codes, 4>(job, codes, m0, p0, p1);
  }
  const int64_t end = min64(w.halves, p1 * w.panel_halves);
  for (int64_t h = p0 * w.panel_halves; h < end; h += kVectors)
    compute_block(job, codes, m0, m1, h, min64(end, h + kVectors));
}

}  // namespace
}  // namespace qkern
