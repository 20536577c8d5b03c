// SPDX-License-Identifier: Apache-2.0
// The chassis of all int8-activation linear kernels for AVX-512, with or without VNNI. A kernel is
// this header and a choice of codes (a8_codes_avx512.h).
//
// Few rows stream the weights (a8_stream_avx512.h). From kStreamRows on, a piece of columns of up
// to 64 outputs is unpacked to bytes once per block of rows, [k / 4][vector][64] in the first-level
// cache, and register tiles (a8_tile_avx512.h) run over it; 8-bit Int already lies so. Integers
// commute within a chunk, so both ways give the same bits; the float32 steps per chunk are those of
// kernels.h.
#pragma once

#include "a8_stream_avx512.h"

namespace qkern {
namespace {

constexpr int kBlockRows = 48;      // float32 accumulators of a block: 12 KiB at 64 outputs
constexpr int64_t kPiece = 128;     // columns of scratch (8 KiB at 64 outputs); whole units
constexpr int64_t kDirectPiece = 1024;

// A half of a panel and its first output.
struct HalfAt {
  const uint8_t* panel;
  int half, halves;
  int64_t n0;
};

// Rows of one tile start at `m`, `row` in the block.
struct TileAt {
  int64_t m, row, chunk;
  bool first, last;  // piece of the chunk
};

// A block of rows times kVectors halves of 16 outputs.
template <class Codes, int kVectors>
struct Block {
  static constexpr int kPanels = kVectors / Codes::kPanelHalves;

  const LinearJob& job;
  const Codes& codes;
  HalfAt halves[kVectors];
  int count;    // of halves
  bool direct;  // packed bytes are used where they lie
  alignas(64) uint8_t scratch[kPiece * kHalf * kVectors];
  alignas(64) float scales[kVectors][kHalf];
  alignas(64) float negative_zeros[kVectors][kHalf];
  alignas(64) float acc[kBlockRows][kVectors][kHalf];
  alignas(64) int32_t sums[kBlockRows][kVectors][kHalf];

  // Halves [h0, h1) of the weight. Vectors beyond repeat the first half; nobody stores them.
  Block(const LinearJob& j, const Codes& c, int64_t h0, int64_t h1)
      : job(j), codes(c), count((int)(h1 - h0)), direct(Codes::kBits == 8 && count == kVectors) {
    const Packed& w = *job.w;
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t h = v < count ? h0 + v : h0, p = h / Codes::kPanelHalves;
      halves[v] = {w.panel(p), (int)(h % Codes::kPanelHalves), w.halves_of(p), h * kHalf};
    }
  }

  const uint8_t* unit_of(const HalfAt& at, int64_t g, int64_t k0) const {
    const Packed& w = *job.w;
    const uint8_t* group_codes = w.codes_of(w.group_block(at.panel, g, at.halves));
    return group_codes + (k0 / Codes::kUnit * at.halves + at.half) * Codes::kUnitBytes;
  }

  // Columns [k0, k0 + columns) of group g to scratch.
  void unpack(int64_t g, int64_t k0, int64_t columns) {
    const uint8_t* units[kVectors];
    const uint8_t* tables[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const HalfAt& at = halves[v];
      units[v] = unit_of(at, g, k0);
      tables[v] =
          job.w->group_table_bytes ? job.w->group_block(at.panel, g, at.halves) : at.panel;
    }
    uint8_t* to = scratch;
    for (int64_t k = 0; k < columns; k += Codes::kUnit) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        __m512i parts[Codes::kHalfVectors][Codes::kParts];
#pragma GCC unroll 4
        for (int i = 0; i < Codes::kHalfVectors; ++i) codes.load(units[v], i, tables[v], parts[i]);
#pragma GCC unroll 8
        for (int part = 0; part < Codes::kParts; ++part) {
          __m512i bytes[Codes::kHalfVectors];
#pragma GCC unroll 4
          for (int i = 0; i < Codes::kHalfVectors; ++i) bytes[i] = parts[i][part];
          if constexpr (Codes::kHalfVectors == 4) transpose_dwords(bytes);
#pragma GCC unroll 4
          for (int i = 0; i < Codes::kHalfVectors; ++i)
            _mm512_store_si512(to + 64 * (kVectors * (part * Codes::kHalfVectors + i) + v),
                               bytes[i]);
        }
        units[v] += Codes::kUnitBytes * halves[v].halves;
      }
      to += 64 * kVectors * Codes::kParts * Codes::kHalfVectors;
    }
  }

  // Tile i of n fetches its share of what follows the piece at k0 in each panel.
  void look_ahead(int64_t g, int64_t k0, int64_t columns, int64_t i, int64_t n,
                  TileInput* in) const {
    const HalfAt& at = halves[0];
    const int64_t bytes = columns * kHalf * Codes::kBits / 8 * at.halves;
    in->ahead_step = bytes / (n * in->steps);
    for (int p = 0; p < kPanels; ++p)
      in->ahead[p] = reinterpret_cast<const char*>(unit_of(halves[p * Codes::kPanelHalves], g, k0)) +
                     bytes + i * in->ahead_step * in->steps;
  }

  void load_terms(int64_t g) {
    const Packed& w = *job.w;
    for (int v = 0; v < kVectors; ++v) {
      const HalfAt& at = halves[v];
      const uint8_t* block = w.group_block(at.panel, g, at.halves);
      _mm_prefetch(reinterpret_cast<const char*>(w.scales_of(block, g, at.halves) +
                                                 at.half * w.scale_bytes +
                                                 w.group_bytes * at.halves),
                   _MM_HINT_T0);
      _mm512_store_ps(scales[v], load_scales(w, block, g, at.half, at.halves));
      if (w.zero_bytes)
        _mm512_store_ps(negative_zeros[v], load_negative_zeros(w, block, g, at.half, at.halves));
    }
  }

  // The float32 steps of a chunk for the rows of a tile.
  template <int kRows>
  void add_tile(const TileAt& at, const __m512i (&tile)[kRows][kVectors]) {
    const Packed& w = *job.w;
    const int64_t first = at.m * job.chunks + at.chunk;
    __m512 t[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) t[r][v] = _mm512_cvtepi32_ps(tile[r][v]);
    if (w.zero_bytes) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512 x_sum = _mm512_set1_ps(job.x_sum[first + r * job.chunks]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          t[r][v] = _mm512_fmadd_ps(_mm512_load_ps(negative_zeros[v]), x_sum, t[r][v]);
      }
    }
    float(*to)[kVectors][kHalf] = acc + at.row;
    __m512 scale[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) scale[v] = _mm512_load_ps(scales[v]);
    if (w.h.activations == QK_ACT_INT8_GROUP) {
      const float* x_scales = job.q_scale + first;
      const int64_t stride = job.chunks;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512 x_scale = _mm512_set1_ps(x_scales[r * stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          _mm512_store_ps(to[r][v], _mm512_fmadd_ps(t[r][v], _mm512_mul_ps(scale[v], x_scale),
                                                    _mm512_load_ps(to[r][v])));
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          _mm512_store_ps(to[r][v], _mm512_fmadd_ps(t[r][v], scale[v], _mm512_load_ps(to[r][v])));
    }
  }

  template <int kRows>
  static void run_tile(Block& b, const TileInput& in, TileAt at) {
    __m512i tile[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        tile[r][v] = at.first ? _mm512_set1_epi32(
                                    b.job.q_init[(at.m + r) * b.job.chunks + at.chunk])
                              : _mm512_load_si512(b.sums[at.row + r][v]);
    sum_tile<Codes::kLargest, kPanels>(in, tile);
    if (at.last) {
      b.template add_tile<kRows>(at, tile);
      return;
    }
    int32_t(*to)[kVectors][kHalf] = b.sums + at.row;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) _mm512_store_si512(to[r][v], tile[r][v]);
  }

  // One piece for `rows` rows from m0, in tiles as equal as possible.
  void run_tiles(int64_t g, int64_t k0, int64_t columns, TileAt at, int64_t rows) {
    using Tile = void (*)(Block&, const TileInput&, TileAt);
    static constexpr Tile kTiles[kTileRows] = {run_tile<1>, run_tile<2>, run_tile<3>,
                                               run_tile<4>, run_tile<5>, run_tile<6>};
    TileInput in = {};
    in.x_stride = job.q_stride;
    in.steps = columns / 4;
    if (direct) {
      in.low = unit_of(halves[0], g, k0);
      in.high = kVectors > 2 ? unit_of(halves[kVectors - 2], g, k0) : nullptr;
      in.stride = 2 * Codes::kUnitBytes;
    } else {
      unpack(g, k0, columns);
      in.low = scratch;
      in.high = scratch + 128;
      in.stride = 64 * kVectors;
    }
    const int64_t tiles = ceil_div(rows, kTileRows), m0 = at.m;
    for (int64_t i = 0; i < tiles; ++i) {
      at.row = rows * i / tiles;
      at.m = m0 + at.row;
      look_ahead(g, k0, columns, i, tiles, &in);
      in.x = job.q + at.m * job.q_stride + g * job.w->group_padded + k0;
      kTiles[rows * (i + 1) / tiles - at.row - 1](*this, in, at);
    }
  }

  void run(int64_t m0, int64_t rows) {
    const Packed& w = *job.w;
    memset(acc, 0, sizeof acc[0] * (size_t)rows);
    const int64_t longest = direct ? kDirectPiece : kPiece;
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t padded = w.group_columns_padded(g);
      load_terms(g);
      for (int64_t c = 0; c * job.chunk < padded; ++c) {
        const int64_t begin = c * job.chunk, end = min64(padded, begin + job.chunk);
        for (int64_t k = begin; k < end; k += longest)
          run_tiles(g, k, min64(longest, end - k),
                    {m0, 0, g * job.chunks_per_group + c, k == begin, k + longest >= end}, rows);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < count; ++v)
        store_outputs(job, _mm512_load_ps(acc[r][v]), m0 + r, halves[v].n0);
  }
};

// Rows [m0, m1) of halves [h0, h1), at most kVectors of them.
template <class Codes, int kVectors>
void compute_block(const LinearJob& job, const Codes& codes, int64_t m0, int64_t m1, int64_t h0,
                   int64_t h1) {
  Block<Codes, kVectors> block(job, codes, h0, h1);
  const int64_t blocks = ceil_div(m1 - m0, kBlockRows), rows = m1 - m0;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = rows * i / blocks;
    block.run(m0 + begin, rows * (i + 1) / blocks - begin);
  }
}

// The whole kernel: rows [m0, m1) of panels [p0, p1).
template <class Codes>
inline void linear_a8(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const Packed& w = *job.w;
  const Codes codes(w);
  const int64_t rows = m1 - m0;
  if (rows <= kStreamRows) {
    const bool whole = p1 == p0 || w.halves_of(p1 - 1) == w.panel_halves;
    const int64_t length = (p1 - p0 - (whole ? 0 : 1)) / kStreams;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t indices[kStreams] = {p0 + i, p0 + length + i, p0 + 2 * length + i,
                                         p0 + 3 * length + i};
      if (rows == 1) stream_panels<Codes, 1>(job, codes, m0, indices);
      if (rows == 2) stream_panels<Codes, 2>(job, codes, m0, indices);
      if (rows == 3) stream_panels<Codes, 3>(job, codes, m0, indices);
      if (rows == 4) stream_panels<Codes, 4>(job, codes, m0, indices);
    }
    p0 += kStreams * length;
  }
  const int64_t end = min64(w.halves, p1 * w.panel_halves);
  for (int64_t h = p0 * w.panel_halves; h < end; h += 4) {
    if (end - h > 2)
      compute_block<Codes, 4>(job, codes, m0, m1, h, min64(end, h + 4));
    else
      compute_block<Codes, 2>(job, codes, m0, m1, h, end);
  }
}

}  // namespace
}  // namespace qkern
