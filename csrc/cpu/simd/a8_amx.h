// SPDX-License-Identifier: Apache-2.0
// The chassis of the int8-activation linear kernels for AMX. A kernel is this header and a choice
// of codes (a8_codes_avx512.h).
//
// Few rows stream the weights as with AVX-512 (a8_stream_avx512.h): memory is their limit. More
// meet the pieces of a8_pieces_avx512.h in tiles: 16 rows x 64 columns of activations where they
// lie times 64 columns x 16 outputs of unpacked weights. Integers commute within a chunk, so the
// bits are those of every other kernel.
//
// Four sums, two tiles of activations and two of weights fill the eight tile registers:
//   pairs of segments that are whole chunks: a tile of rows x two halves x two chunks;
//   parts of a long chunk:                   two tiles of rows x two halves.
// A tile of sums can only go to memory. Of a pair, the sums of the first chunk leave while the
// second is multiplied, and the float32 steps of a pair run two pairs later, beside the products.
//
// What limits (one thread of a Granite Rapids class core, 3.5 GHz; a product of two full tiles
// takes 18 cycles, 6.1 TOPS): a tile load 9 cycles from L1 and 22 from L2, a tile store 16; a pair
// of 128-column chunks is 8 products (41 ns), 12 loads (50 ns together), 4 stores and 64 vectors
// of float32 steps (48 ns together). A loop of just these, on data in L1 and L2, takes 100 ns per
// pair: they overlap only in part. In the kernel, 4096 x 4096, M = 256, int4-g128, 6.9 ms: pairs
// 5.1 (155 ns each), unpacking 0.5, outputs 0.7, quantizing 0.4 (1.25 TOPS, where avx512vnni has
// 0.45); 1.9 TOPS where a chunk is a row (codebook4). Below M = 16 reading the weights limits.
//
// Tried and lost: float32 steps right after the stores (loads wait for stores that wait for
// products: 15 % slower); the steps strewn between single products (nothing); blocks of 32 to 128
// rows instead of 256 (weights are unpacked more often: 10 to 45 % slower); all blocks of rows for
// two halves before the next two (activations leave L2: int8, M = 512, 17.9 ms instead of 9.4);
// fetching the next piece to L1 instead of L2 (20 % slower at M = 64), every second or fourth line
// of what comes next, the neighbours left to the hardware (15 %), while unpacking (14 to 20 %: all
// misses at once).
#pragma once

#include "a8_avx512.h"
#include "amx.h"

namespace qkern {
namespace {

constexpr int64_t kTileColumns = 64, kAmxRows = 16;
constexpr int kBlockTiles = 16;           // of rows that share an unpacked piece, at most
constexpr int kLeastTiles = 4;            // and at least, where there are more rows
constexpr int64_t kBlockBytes = 5 << 18;  // of activations of a block, where it has more tiles
constexpr int kAheadStreams = 8;          // that fetch the next panel
// Below, the tiles of a8_tile_avx512.h are as fast or faster.
template <class Codes>
constexpr int64_t kAmxLeastRows = Codes::kPlain ? 5 : 8;

// Tile registers: sums 0..3, activations 4 and 5, weights 6 and 7.
constexpr int kActivationTile = 4, kWeightTile = 6;

// Unpacked codes become signed at once: no sum of a chunk then needs the sum of its activations.
template <class Codes>
constexpr bool kSigned = Codes::kStreamed && !Codes::kPlain;

// Chunks from `segment` on for a tile of rows.
struct Chunks {
  int64_t tile;
  int segment;
};

template <class Codes, bool kZeros, bool kGrouped>
struct AmxBlock : Pieces<Codes, kSigned<Codes>> {
  using Base = Pieces<Codes, kSigned<Codes>>;
  using Base::job;
  using Base::segments;

  const int64_t rows;   // of a tile
  int64_t m0, m1;       // the first row of the block; behind the last row of all
  int64_t tiles;        // of this block
  int64_t pairs_begun;  // of those that are not done
  Chunks pair[2];       // the last two of them
  const char* ahead[kAheadStreams];
  int64_t ahead_streams, ahead_step;
  alignas(64) int32_t products[2][4][kAmxRows][kHalf];  // of a pair: [chunk, half]
  alignas(64) float acc[kBlockTiles][kAmxRows][kVectors][kHalf];
  alignas(64) int32_t sums[kBlockTiles][kVectors][kAmxRows][kHalf];  // of chunks that span pieces

  AmxBlock(const LinearJob& j, const Codes& c, int64_t rows_of_tile, int64_t columns, int64_t h0,
           int64_t h1)
      : Base(j, c, columns, h0, h1), rows(rows_of_tile) {}

  // The last tile ends with the last row: it may repeat rows of the one before.
  int64_t row_of(int64_t tile) const { return min64(m0 + tile * rows, m1 - rows); }
  const int8_t* activations(int64_t tile, const Segment& s) const {
    return job.q + row_of(tile) * job.q_stride + s.column;
  }

  // Where packed bytes are used in place: one step's share of the next panel, which a panel's steps
  // fetch as kAheadStreams streams, to the second-level cache (int8, one thread, M = 64: 2.4 ms
  // with one stream a piece ahead, 2.3 with four, 2.0 with eight).
  void fetch_ahead() {
    if constexpr (Codes::kStreamed) {
      for (int64_t line = 0; line < ahead_step; ++line)
        for (int i = 0; i < ahead_streams; ++i) _mm_prefetch(ahead[i] + 64 * line, _MM_HINT_T1);
      for (int i = 0; i < ahead_streams; ++i) ahead[i] += 64 * ahead_step;
    }
  }

  // The float32 steps of one or two chunks for a tile of rows.
  template <int kChunks>
  void add_chunks(const Chunks& at, const int32_t (*from)[kAmxRows][kHalf]) {
    __m512 scale[kChunks][kVectors], zero[kChunks][kVectors];
    const int32_t* init[kChunks];
    const float *x_sum[kChunks], *x_scale[kChunks];
    const int64_t stride = job.chunks, count = rows;
#pragma GCC unroll 2
    for (int c = 0; c < kChunks; ++c) {
      const int segment = at.segment + c;
      const int64_t first = row_of(at.tile) * stride + segments[segment].chunk;
      if constexpr (!kSigned<Codes>) init[c] = job.q_init + first;
      if constexpr (kZeros) x_sum[c] = job.x_sum + first;
      if constexpr (kGrouped) x_scale[c] = job.q_scale + first;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        scale[c][v] = _mm512_load_ps(this->scales[segment][v]);
        if constexpr (kZeros) zero[c][v] = _mm512_load_ps(this->negative_zeros[segment][v]);
      }
    }
    float* sum = acc[at.tile][0][0];
    const int32_t* product = from[0][0];
    for (int64_t r = 0, row = 0; r < count;
         ++r, row += stride, sum += kVectors * kHalf, product += kHalf) {
      __m512 total[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) total[v] = _mm512_load_ps(sum + v * kHalf);
#pragma GCC unroll 2
      for (int c = 0; c < kChunks; ++c) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          __m512i p = _mm512_load_si512(product + (kVectors * c + v) * kAmxRows * kHalf);
          if constexpr (!kSigned<Codes>) p = _mm512_add_epi32(p, _mm512_set1_epi32(init[c][row]));
          __m512 t = _mm512_cvtepi32_ps(p), factor = scale[c][v];
          if constexpr (kZeros) t = _mm512_fmadd_ps(zero[c][v], _mm512_set1_ps(x_sum[c][row]), t);
          if constexpr (kGrouped) factor = _mm512_mul_ps(factor, _mm512_set1_ps(x_scale[c][row]));
          total[v] = _mm512_fmadd_ps(t, factor, total[v]);
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) _mm512_store_ps(sum + v * kHalf, total[v]);
    }
  }

  // Products of a whole chunk for a tile of rows, to the sums kFirst and kFirst + 1.
  template <int kFirst>
  void multiply(int64_t tile, const Segment& s) {
    const int8_t* x = activations(tile, s);
    const uint8_t* weights = s.weights;
    const int64_t step = this->step, columns = s.columns, stride = s.stride,
                  x_stride = job.q_stride;
    tile_zero<kFirst>(), tile_zero<kFirst + 1>();
    for (int64_t k = 0; k < columns; k += step, x += step, weights += step / 4 * stride) {
      fetch_ahead();
      tile_load<kActivationTile>(x, x_stride);
      tile_load<kWeightTile>(weights, stride);
      tile_load<kWeightTile + 1>(weights + 64, stride);
      dot<kFirst, kActivationTile, kWeightTile>();
      dot<kFirst + 1, kActivationTile, kWeightTile + 1>();
    }
  }

  // Segments i and i + 1, whole chunks, for a tile of rows. Sums leave their tiles one chunk late
  // and meet their float32 steps two pairs late, so that nothing waits for the end of a product.
  void run_pair(int64_t tile, int i) {
    const int slot = pairs_begun & 1;
    multiply<0>(tile, segments[i]);
    if (pairs_begun > 0) store_second(slot ^ 1);
    if (pairs_begun > 1) add_chunks<2>(pair[slot], products[slot]);
    multiply<2>(tile, segments[i + 1]);
    tile_store<0>(products[slot][0], 64), tile_store<1>(products[slot][1], 64);
    pair[slot] = {tile, i};
    ++pairs_begun;
  }

  void store_second(int slot) {
    tile_store<2>(products[slot][2], 64), tile_store<3>(products[slot][3], 64);
  }

  void finish_pairs() {
    if (pairs_begun == 0) return;
    const int slot = (pairs_begun - 1) & 1;
    store_second(slot);
    if (pairs_begun > 1) add_chunks<2>(pair[slot ^ 1], products[slot ^ 1]);
    add_chunks<2>(pair[slot], products[slot]);
    pairs_begun = 0;
  }

  template <int kSums, int kActivations, int kWeights>
  static void dot() {
    if constexpr (kSigned<Codes>)
      tile_dot_signed<kSums, kActivations, kWeights>();
    else
      tile_dot<kSums, kActivations, kWeights>();
  }

  // Segment i for one or two tiles of rows.
  template <int kTiles>
  void run_single(int64_t tile, int i) {
    finish_pairs();
    const Segment& s = segments[i];
    const int8_t *x = activations(tile, s), *z = activations(tile + kTiles - 1, s);
    int32_t (*carried)[kVectors][kAmxRows][kHalf] = sums + tile;
    if (s.first) {
      tile_zero<0>(), tile_zero<1>();
      if constexpr (kTiles == 2) tile_zero<2>(), tile_zero<3>();
    } else {
      tile_load<0>(carried[0][0], 64), tile_load<1>(carried[0][1], 64);
      if constexpr (kTiles == 2) tile_load<2>(carried[1][0], 64), tile_load<3>(carried[1][1], 64);
    }
    for (int64_t k = 0; k < s.columns; k += this->step) {
      fetch_ahead();
      const uint8_t* weights = s.weights + k / 4 * s.stride;
      tile_load<kWeightTile>(weights, s.stride);
      tile_load<kActivationTile>(x + k, job.q_stride);
      tile_load<kWeightTile + 1>(weights + 64, s.stride);
      dot<0, kActivationTile, kWeightTile>();
      dot<1, kActivationTile, kWeightTile + 1>();
      if constexpr (kTiles == 2) {
        tile_load<kActivationTile + 1>(z + k, job.q_stride);
        dot<2, kActivationTile + 1, kWeightTile>();
        dot<3, kActivationTile + 1, kWeightTile + 1>();
      }
    }
    tile_store<0>(carried[0][0], 64), tile_store<1>(carried[0][1], 64);
    if constexpr (kTiles == 2) tile_store<2>(carried[1][0], 64), tile_store<3>(carried[1][1], 64);
    if (!s.last) return;
    for (int t = 0; t < kTiles; ++t) add_chunks<1>({tile + t, i}, carried[t]);
  }

  bool whole(int i) const { return segments[i].first && segments[i].last; }
  bool pairs(int i) const { return i + 1 < this->segment_count && whole(i) && whole(i + 1); }

  // Sets what the steps of this piece fetch: as much of the next panels as it is of its own.
  void plan_fetches() {
    if constexpr (Codes::kStreamed) {
      int64_t steps = 0;
      for (int i = 0; i < this->segment_count; ++i) {
        const int64_t of_tile = ceil_div(segments[i].columns, this->step);
        steps += pairs(i) ? tiles * of_tile : ceil_div(tiles, 2) * of_tile;
        i += pairs(i);
      }
      const uint8_t* panel = this->halves[0].panel;
      const int64_t bytes = kVectors * job.w->half_bytes;
      const int64_t done = Base::kPanels * (this->begin[0] - panel);
      const int64_t lines = ceil_div(Base::kPanels * (this->end[0] - this->begin[0]), 64 * steps);
      ahead_streams = min64(kAheadStreams, lines);
      ahead_step = ceil_div(lines, kAheadStreams);
      for (int i = 0; i < ahead_streams; ++i)
        ahead[i] = reinterpret_cast<const char*>(panel + bytes + i * bytes / ahead_streams +
                                                 done / ahead_streams);
    }
  }

  // The piece for all rows.
  void run_piece() {
    plan_fetches();
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      const bool two = tile + 1 < tiles;
      for (int i = 0; i < this->segment_count; ++i) {
        if (pairs(i)) {
          run_pair(tile, i);
          if (two) run_pair(tile + 1, i);
          ++i;
        } else {
          two ? run_single<2>(tile, i) : run_single<1>(tile, i);
        }
      }
    }
    finish_pairs();  // their scales are those of this piece
  }

  // Tiles [first, last) of rows, of those that end at row `end`; begins at row `begin`.
  void run(int64_t begin, int64_t end, int64_t first, int64_t last) {
    m0 = begin + first * rows;
    m1 = end;
    tiles = last - first;
    pairs_begun = 0;
    memset(acc, 0, sizeof acc[0] * (size_t)tiles);
    Base::walk(*this);
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < this->count; ++v)
          store_outputs(job, _mm512_load_ps(acc[t][r][v]), row_of(t) + r, this->halves[v].n0);
  }
};

// Rows [m0, m1) in tiles of `rows`, halves [h0, h1). The activations of a block stay in the
// second-level cache while all weights meet them.
template <class Codes, bool kZeros, bool kGrouped>
void run_blocks(const LinearJob& job, const Codes& codes, int64_t m0, int64_t m1, int64_t rows,
                int64_t columns, int64_t h0, int64_t h1) {
  const int64_t fit = kBlockBytes / (rows * job.w->k_padded);
  const int64_t most = min64(kBlockTiles, fit < kLeastTiles ? kLeastTiles : fit);
  const int64_t tiles = ceil_div(m1 - m0, rows), blocks = ceil_div(tiles, most);
  for (int64_t i = 0; i < blocks; ++i)
    for (int64_t h = h0; h < h1; h += kVectors) {
      AmxBlock<Codes, kZeros, kGrouped> block(job, codes, rows, columns, h,
                                              min64(h1, h + kVectors));
      block.run(m0, m1, tiles * i / blocks, tiles * (i + 1) / blocks);
    }
}

// Rows [m0, m1) of panels [p0, p1) in tiles.
template <class Codes>
__attribute__((noinline)) void multiply_tiles(const LinearJob& job, int64_t m0, int64_t m1,
                                              int64_t p0, int64_t p1) {
  const Packed& w = *job.w;
  const Codes codes(w);
  const int64_t rows = ceil_div(m1 - m0, ceil_div(m1 - m0, kAmxRows));
  const int64_t columns = min64(kTileColumns, min64(job.chunk, w.group_padded));
  TileShapes shapes;
  for (int sums = 0; sums < kActivationTile; ++sums) shapes.set(sums, rows, 64);
  for (int i = 0; i < 2; ++i) {
    shapes.set(kActivationTile + i, rows, columns);
    shapes.set(kWeightTile + i, columns / 4, 64);
  }
  tiles_configure(shapes);
  const bool grouped = w.h.activations == QK_ACT_INT8_GROUP;
  auto* run = grouped ? run_blocks<Codes, false, true> : run_blocks<Codes, false, false>;
  if constexpr (Codes::kZeros)
    if (w.zero_bytes)
      run = grouped ? run_blocks<Codes, true, true> : run_blocks<Codes, true, false>;
  run(job, codes, m0, m1, rows, columns, p0 * w.panel_halves, min64(w.halves, p1 * w.panel_halves));
  tiles_release();
  _mm256_zeroupper();
}

// The whole kernel.
template <class Codes>
inline void linear_a8_amx(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if (m1 - m0 < kAmxLeastRows<Codes>) return linear_a8<Codes>(job, m0, m1, p0, p1);
  if (p0 < p1) multiply_tiles<Codes>(job, m0, m1, p0, p1);
}

}  // namespace
}  // namespace qkern
