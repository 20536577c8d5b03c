// SPDX-License-Identifier: Apache-2.0
// c = a . b of int8, exact int32 sums, in tile registers; both operands dense along k.
//
// The transposed problem: 16 columns of b times 64 of k are a tile where they lie, and 16 rows of a
// are turned to four columns of k per dword, once for all of b. So b is neither turned nor copied
// nor made unsigned. Four sums, two tiles of b and two of a; a tile of sums is turned at the end,
// 64 shuffles.
//
// One thread of a Granite Rapids class core, 4096 x 4096, b a transposed weight, M = 9 / 16 / 64 /
// 256: 1.36 / 1.38 / 1.8 / 4.8 ms (1.8 TOPS; avx512vnni 2.3 / 2.8 / 5.9 / 20, torch._int_mm 3.5 /
// 3.4 / 4.1 / 7.1 ms). Up to M = 32 reading b limits (12 GB/s); from a cache M = 16 takes 0.67 ms.
//
// Tried and lost: pieces of b copied first, since its rows, 4096 bytes apart, share a cache set
// (M = 64 2.4 ms, M = 256 the same); sums in tiles for 1024 instead of 512 columns (M = 256 5.6 ms
// with copies); prefetches of the next 512 columns of the same rows (M = 16 1.5 ms, M = 1024 22
// instead of 21); 1, 2, 4, 16 or 32 streams instead of 8 (M = 16 1.97, 1.49, 1.40, 1.39, 1.65; M =
// 256 5.7, 5.1, 4.5, 5.4, 5.2).

#include "kernels.h"
#include "simd/amx.h"
#include "simd/rows_avx512.h"
#include "simd/transpose_avx512.h"

namespace qkern {

void int8_matmul_avx512vnni(const MatmulJob&, int64_t, int64_t, int64_t, int64_t);

namespace {

constexpr int64_t kRows = kTurnedRows;    // of a tile: rows of a, or columns of b
constexpr int64_t kStep = 64;             // columns of k that a tile has
constexpr int64_t kTile = kRows * kStep;  // bytes
constexpr int kHalves = 2;                // tiles of b at a time
constexpr int64_t kWide = kHalves * kRows;
constexpr int64_t kPiece = 512;  // columns of k between two stores of sums
constexpr int kStreams = 8;      // that fetch the columns of b that come next
constexpr int64_t kStreamRows = kWide / kStreams;
constexpr int64_t kBlockTiles = 16;       // of rows that pass a piece, at most
constexpr int64_t kLeastTiles = 4;        // and at least, where there are more
constexpr int64_t kBlockBytes = 5 << 18;  // of turned rows, where there are more: half of a cache

// Where the tiles of b lie: step s of half h at from + h * half + s * step, rows `stride` apart.
struct Columns {
  const int8_t* from;
  int64_t half, step, stride;
};

struct Block {
  const MatmulJob& job;
  int64_t m0, m1;       // rows
  int64_t tile_bytes;   // of turned rows
  int64_t n, count;     // columns of b
  const int8_t* ahead;  // what the first stream fetches next
  int64_t ahead_k, ahead_rows, ahead_lines;
  alignas(64) int8_t copied[kHalves][kPiece / kStep][kTile];
  alignas(64) int32_t sums[kBlockTiles][kHalves][kRows][kRows];  // [column of b][row of a]

  Block(const MatmulJob& j, int64_t first_row, int64_t end_row, int64_t bytes)
      : job(j), m0(first_row), m1(end_row), tile_bytes(bytes) {}

  int64_t tiles() const { return ceil_div(m1 - m0, kRows); }

  // Columns k .. k + length - 1 of k, zeros behind them and in place of absent columns of b.
  void copy_piece(int64_t k, int64_t length) {
    for (int64_t c = 0; c < kWide; ++c) {
      const int8_t* from = job.b + (n + c) * job.b_stride + k;
      int8_t* to = copied[0][0] + c / kRows * sizeof copied[0] + c % kRows * kStep;
      for (int64_t i = 0; i < length; i += kStep, to += kTile) {
        const __mmask64 mask = c < count ? first_bytes(length - i) : 0;
        _mm512_store_si512(to, _mm512_maskz_loadu_epi8(mask, from + i));
      }
    }
  }

  // One step's share of the next columns of b, to the second-level cache.
  void fetch_ahead() {
    if (ahead_rows == 0) return;
    for (int64_t line = 0; line < ahead_lines; ++line)
      for (int i = 0; i < kStreams; ++i)
        _mm_prefetch((const char*)ahead + i * kStreamRows * job.b_stride + 64 * line, _MM_HINT_T1);
    ahead += 64 * ahead_lines;
    ahead_k += 64 * ahead_lines;
    if (ahead_k < job.k) return;
    ahead += job.b_stride - ahead_k;
    ahead_k = 0;
    --ahead_rows;
  }

  // `steps` of kPiece, for one or two tiles of rows.
  template <int kTiles>
  void multiply(int64_t tile, int64_t k, int64_t steps, const Columns& b) {
    int32_t (*to)[kHalves][kRows][kRows] = sums + tile;
    if (k == 0) {
      tile_zero<0>(), tile_zero<1>();
      if constexpr (kTiles == 2) tile_zero<2>(), tile_zero<3>();
    } else {
      tile_load<0>(to[0][0], 64), tile_load<1>(to[0][1], 64);
      if constexpr (kTiles == 2) tile_load<2>(to[1][0], 64), tile_load<3>(to[1][1], 64);
    }
    const int8_t* from = b.from;
    const int8_t* rows = job.turned + (m0 / kRows + tile) * tile_bytes + k * kRows;
    for (int64_t s = 0; s < steps; ++s, from += b.step, rows += kTile) {
      fetch_ahead();
      tile_load<4>(rows, 64);
      tile_load<6>(from, b.stride);
      tile_load<7>(from + b.half, b.stride);
      tile_dot_signed<0, 6, 4>();
      tile_dot_signed<1, 7, 4>();
      if constexpr (kTiles == 2) {
        tile_load<5>(rows + tile_bytes, 64);
        tile_dot_signed<2, 6, 5>();
        tile_dot_signed<3, 7, 5>();
      }
    }
    tile_store<0>(to[0][0], 64), tile_store<1>(to[0][1], 64);
    if constexpr (kTiles == 2) tile_store<2>(to[1][0], 64), tile_store<3>(to[1][1], 64);
  }

  void multiply_piece(int64_t k, int64_t length) {
    const int64_t steps = ceil_div(length, kStep), pairs = ceil_div(tiles(), 2);
    Columns b = {job.b + n * job.b_stride + k, kRows * job.b_stride, kStep, job.b_stride};
    if (count < kWide || length % kStep) {
      copy_piece(k, length);
      b = {copied[0][0], (int64_t)sizeof copied[0], kTile, kStep};
    }
    for (int64_t i = 0; i < pairs; ++i)
      if (2 * i + 1 < tiles())
        multiply<2>(2 * i, k, steps, b);
      else
        multiply<1>(2 * i, k, steps, b);
  }

  void store() {
    for (int64_t t = 0; t < tiles(); ++t)
      for (int h = 0; h < kHalves; ++h) {
        const int64_t left = count - h * kRows;
        if (left <= 0) continue;
        const __mmask16 columns = first_lanes(left);
        const int64_t row = m0 + t * kRows, rows = min64(kRows, m1 - row);
        __m512i v[kRows];
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) v[i] = _mm512_load_si512(sums[t][h][i]);
        transpose_16x16(v);
        int32_t* c = job.c + row * job.c_stride + n + h * kRows;
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
          if (r < rows) _mm512_mask_storeu_epi32(c + r * job.c_stride, columns, v[r]);
      }
  }

  void run(int64_t n0, int64_t n1) {
    for (n = n0; n < n1; n += kWide) {
      count = min64(kWide, n1 - n);
      ahead = job.b + (n + kWide) * job.b_stride;
      ahead_k = 0;
      ahead_rows = kStreamRows;
      ahead_lines = ceil_div(kStreamRows, ceil_div(tiles(), 2));
      for (int64_t k = 0; k < job.k; k += kPiece) multiply_piece(k, min64(kPiece, job.k - k));
      store();
    }
  }
};

}  // namespace

void int8_matmul_avx512amx(const MatmulJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  if (!job.turned) return int8_matmul_avx512vnni(job, m0, m1, n0, n1);
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.set(tile, kRows, 64);
  tiles_configure(shapes);
  const int64_t tile_bytes = turned_tile_bytes(job.k), fit = kBlockBytes / tile_bytes;
  const int64_t tiles = ceil_div(m1 - m0, kRows);
  const int64_t blocks = ceil_div(tiles, min64(kBlockTiles, fit < kLeastTiles ? kLeastTiles : fit));
  for (int64_t i = 0; i < blocks; ++i) {
    Block block(job, m0 + tiles * i / blocks * kRows,
                min64(m1, m0 + tiles * (i + 1) / blocks * kRows), tile_bytes);
    block.run(n0, n1);
  }
  tiles_release();
  _mm256_zeroupper();
}

}  // namespace qkern
