// SPDX-License-Identifier: Apache-2.0
// The chassis of all int8-activation linear kernels for AVX-512, with or without VNNI. A kernel is
// this header and a choice of codes (a8_codes_avx512.h).
//
// Few rows stream the weights (a8_stream_avx512.h). From kStreamRows on, pieces of columns of 32
// outputs (a8_pieces_avx512.h) are met by register tiles (a8_tile_avx512.h). Integers commute
// within a chunk, so both ways give the same bits; the float32 steps per chunk are those of
// kernels.h.
#pragma once

#include "a8_pieces_avx512.h"
#include "a8_stream_avx512.h"

namespace qkern {
namespace {

constexpr int kBlockRows = 48;  // rows that share an unpacked piece

// A block of up to kBlockRows rows times up to two halves.
template <class Codes>
struct Block : Pieces<Codes> {
  using Pieces<Codes>::job;
  using Pieces<Codes>::segments;
  using Pieces<Codes>::scales;
  using Pieces<Codes>::negative_zeros;
  static constexpr int kPanels = Pieces<Codes>::kPanels;

  int64_t m0, tiles, tile_rows, larger_tiles;  // the first tiles have a row more
  int64_t ahead_step;
  alignas(64) float acc[kBlockRows][kVectors][kHalf];
  alignas(64) int32_t sums[kBlockRows][kVectors][kHalf];  // of a chunk that spans pieces

  Block(const LinearJob& j, const Codes& c, int64_t h0, int64_t h1)
      : Pieces<Codes>(j, c, 4, h0, h1) {}

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
    const int8_t* x = b.job.q + m * in.x_stride;
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
      in.x = x + s.column;
      in.weights = s.weights;
      in.stride = s.stride;
      in.steps = s.columns / 4;
      sum_tile<Codes::kLargest, kPanels>(in, tile);
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) in.ahead[p] += in.steps * in.ahead_step;
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
    ahead_step =
        Codes::kStreamed ? (this->end[0] - this->begin[0]) / (tiles * (this->columns / 4)) + 1 : 0;
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
      const int64_t rows = tile_rows + (i < larger_tiles);
      kTiles[rows - 1](*this, row, i);
      row += rows;
    }
  }

  void run(int64_t first_row, int64_t rows) {
    memset(acc, 0, sizeof acc[0] * (size_t)rows);
    m0 = first_row;
    tiles = ceil_div(rows, kTileRows);
    tile_rows = rows / tiles;
    larger_tiles = rows % tiles;
    Pieces<Codes>::walk(*this);
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < this->count; ++v)
        store_outputs(job, _mm512_load_ps(acc[r][v]), m0 + r, this->halves[v].n0);
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
  // GCC forgets it after calls that take vectors; the caller's SSE code would pay (1 us in Python).
  _mm256_zeroupper();
}

}  // namespace
}  // namespace qkern
