// SPDX-License-Identifier: Apache-2.0
// y = x . W^T in float32 with a table per row or per group (row lanes).
//
// A 16-byte lane holds codes of one row, so that a register looks up two rows at once, each in its
// own table (BytePlanes): a register of values is columns 4q..4q+3 of row r and of row r + 4. Tried
// and lost: vpmovzxbd, two vpermps and a vblendvps (1.7 times the time at M = 1). The contract has
// sixteen
// chains per output, column k in chain k mod 16: register q is chains 4q..4q+3 of both rows, and
// activations are four columns in both 16-byte lanes, a plain load.
//
//   one row: values are used where they are made; four registers of chains per pair of rows.
//   more rows: eight outputs are unpacked piece by piece to the first cache; a tile is 3 rows x 8
//     outputs of one q: 12 accumulators, 3 activations, 1 weight, 7 loads for 12 multiply-adds.
//
// Chains go on through memory from piece to piece, which changes no bit; at the end of a chunk the
// sixteen chains of eight outputs are folded in order after transpositions.
#pragma once

#include <type_traits>

#include "lookup8_avx2.h"
#include "walk_avx2.h"

namespace qkern {
namespace {

constexpr int kPairs = 4;                         // pairs of rows (r, r + 4) of eight outputs
constexpr int64_t kChains = kPairs * 32;          // floats: [pair][q][two rows x 4 chains]
constexpr int kTileRows = 3;                      // rows of a tile
constexpr int64_t kPiece = 256;                   // columns that are unpacked at a time
constexpr int64_t kPairFloats = 2 * kPiece + 48;  // of scratch; loads 4 KiB apart would collide

// Outputs 8 half + pair and 8 half + pair + 4 of a panel: their tables and their first codes.
// Entries beyond the 2^kBits of a table belong to what follows it and are never looked up.
template <int kBits>
using PairTables = std::conditional_t<kBits == 8, WidePair, BytePlanes>;

template <int kBits>
inline PairTables<kBits> pair_tables(const Piece& p, int half, int pair) {
  constexpr int kEntries = 1 << kBits;
  const float* first = reinterpret_cast<const float*>(p.tables) + (8 * half + pair) * kEntries;
  return PairTables<kBits>{first, first + 4 * kEntries};
}
inline const uint8_t* pair_codes(const Piece& p, int half, int pair) {
  return p.codes + 64 * pair + 32 * half;
}

// Calls use(k, values) for every sixteen columns of a pair. The codes lie in every fourth line; the
// second pass over the lines asks memory for those of the next chunk, `ahead` bytes on.
template <int kBits, class Use>
inline void for_pair_values(const Piece& p, int half, int pair, int64_t ahead, const Use& use) {
  constexpr int kSteps = kUnitSteps<kBits>, kBytes = kRowUnitBytes<kBits>;
  const PairTables<kBits> tables = pair_tables<kBits>(p, half, pair);
  const uint8_t* at = pair_codes(p, half, pair);
  for (int64_t k = 0; k < p.columns; at += kBytes) {
    if (half == 1)
      for (int b = 0; b < kBytes; b += 256) prefetch(at + ahead + b);
    for (int s = 0; s < kSteps; ++s, k += 16) {
      __m256 values[4];
      tables.look_up(unit_codes<kBits, 256>(at, s), values);
      use(k, values);
    }
  }
}

// One row times one pair.
template <int kBits>
__attribute__((noinline)) void add_direct(const Piece& p, int half, int pair, int64_t ahead,
                                          const float* x, float* chains) {
  __m256 acc[4];
  repeat<4>([&](int q) { acc[q] = _mm256_load_ps(chains + 8 * q); });
  for_pair_values<kBits>(p, half, pair, ahead, [&](int64_t k, const __m256* values) {
    repeat<4>([&](int q) {
      const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + k + 4 * q));
      acc[q] = _mm256_fmadd_ps(four, values[q], acc[q]);
    });
  });
  repeat<4>([&](int q) { _mm256_store_ps(chains + 8 * q, acc[q]); });
}

// Rows x eight outputs, chains 4q..4q+3; chains is [row][pair][q][8].
template <int kRows>
__attribute__((noinline)) void add_tile(const float* values, int64_t columns, const float* x,
                                        int64_t x_stride, float* chains) {
  for (int q = 0; q < 4; ++q) {
    __m256 acc[kRows * kPairs];
    const auto place = [&](int i) {
      return chains + i / kPairs * kChains + i % kPairs * 32 + 8 * q;
    };
    repeat<kRows * kPairs>([&](int i) { acc[i] = _mm256_load_ps(place(i)); });
    for (int64_t k = 4 * q; k < columns; k += 16) {
      __m256 four[kRows];
      repeat<kRows>([&](int r) {
        four[r] = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + r * x_stride + k));
      });
      repeat<kPairs>([&](int c) {
        const __m256 w = _mm256_load_ps(values + c * kPairFloats + 2 * k);
        repeat<kRows>(
            [&](int r) { acc[r * kPairs + c] = _mm256_fmadd_ps(four[r], w, acc[r * kPairs + c]); });
      });
    }
    repeat<kRows * kPairs>([&](int i) { _mm256_store_ps(place(i), acc[i]); });
  }
}

// All rows of a block in tiles of nearly equal height.
inline void add_rows(const float* values, int64_t columns, const float* x, int64_t x_stride,
                     int rows, float* chains) {
  constexpr decltype(&add_tile<1>) kTiles[] = {add_tile<1>, add_tile<2>, add_tile<3>};
  int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int i = 0, height; i < rows; i += height, --tiles) {
    height = (rows - i + tiles - 1) / tiles;
    kTiles[height - 1](values, columns, x + i * x_stride, x_stride, chains + i * kChains);
  }
}

template <int kBits>
inline void unpack_pair(const Piece& p, int half, int pair, int64_t ahead, float* values) {
  for_pair_values<kBits>(p, half, pair, ahead, [&](int64_t k, const __m256* v) {
    for (int q = 0; q < 4; ++q) _mm256_store_ps(values + 2 * k + 8 * q, v[q]);
  });
}

// ((s_0 + s_1) + ...) + s_15 of eight outputs in order.
inline __m256 fold(const float* chains) {
  __m256 sum = _mm256_setzero_ps();
  for (int q = 0; q < 4; ++q) {
    __m256i pairs[kPairs], lanes[4];
    for (int c = 0; c < kPairs; ++c) pairs[c] = load256(chains + 32 * c + 8 * q);
    transpose_dwords(pairs, lanes);
    for (int l = 0; l < 4; ++l) {
      const __m256 chain = _mm256_castsi256_ps(lanes[l]);
      sum = q + l ? _mm256_add_ps(sum, chain) : chain;
    }
  }
  return sum;
}

template <int kBits>
inline void compute_float_row(const Block& b) {
  const LinearJob& job = b.job;
  const Packed& w = *job.w;
  alignas(64) float values[kPairs * kPairFloats];
  alignas(64) float chains[kRowBlock * kChains];
  alignas(64) float sums[kRowBlock * kHalf];
  alignas(64) float acc[kRowBlock * kHalf];
  memset(acc, 0, sizeof(float) * (size_t)(b.streams * b.rows * kHalf));
  const int64_t piece = b.rows == 1 ? kFloatChunk : kPiece;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t begin = 0; begin < padded; begin += kFloatChunk) {
      const int64_t end = min64(padded, begin + kFloatChunk);
      const int64_t ahead = (end - begin) * kHalf * kBits / 8 - 32;
      for (int s = 0; s < b.streams; ++s)
        for (int half = 0; half < 2; ++half) {
          memset(chains, 0, sizeof(float) * (size_t)(b.rows * kChains));
          for (int64_t k = begin; k < end; k += piece) {
            const Piece p = piece_at(b, s, g, k, min64(piece, end - k));
            const float* x = job.x + b.m * job.x_stride + g * w.group_padded + k;
            for (int pair = 0; pair < kPairs; ++pair)
              if (b.rows == 1)
                add_direct<kBits>(p, half, pair, ahead, x, chains + 32 * pair);
              else
                unpack_pair<kBits>(p, half, pair, ahead, values + pair * kPairFloats);
            if (b.rows > 1) add_rows(values, p.columns, x, job.x_stride, b.rows, chains);
          }
          for (int i = 0; i < b.rows; ++i)
            _mm256_store_ps(sums + (s * b.rows + i) * kHalf + 8 * half, fold(chains + i * kChains));
        }
      end_float_chunk(b, g, g * job.chunks_per_group + begin / kFloatChunk, sums, acc);
    }
  }
  finish_block(b, acc);
}

template <int kBits>
inline void linear_float_row(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  walk(job, m0, m1, p0, p1, kRowBlock, [](const Block& b) { compute_float_row<kBits>(b); });
}

}  // namespace
}  // namespace qkern
