// SPDX-License-Identifier: Apache-2.0
// y = x . W^T in float32 with a table per row or per group (row lanes).
//
// A register holds sixteen columns of one output, looked up in the four byte planes of its table:
// register q of values is columns 4q..4q+3. The contract has sixteen chains per output, column k in
// chain k mod 16, so that four registers of chains take plain vector products with activations.
//
//   one row: values are used where they are made.
//   more rows: four outputs are unpacked piece by piece to the first cache; a tile is 4 rows x 4
//     outputs of one q: 16 accumulators, 4 activations, 4 weights; 8 loads for 16 fmla.
//
// Chains go on through memory from piece to piece, which changes no bit; at the end of a chunk the
// sixteen chains of four outputs are folded in order after transpositions.
//
// Run under emulation only: speed was judged by the instructions of the loops.
#pragma once

#include "walk_neon.h"

namespace qkern {
namespace {

constexpr int64_t kRowBlock = 64;            // rows whose chains stay in the first cache
constexpr int kQuad = 4;                     // outputs 4l .. 4l+3 of a half
constexpr int64_t kChains = kQuad * 16;      // floats: [output][16]
constexpr int64_t kPiece = 256;              // columns that are unpacked at a time
constexpr int64_t kRowFloats = kPiece + 16;  // of scratch; loads 4 KiB apart would collide
constexpr int kTileRows = 4;

// Calls use(k, values) for every sixteen columns of output r of a half.
template <int kBits, class Use>
inline void for_row_values(const Piece& p, int r, const Use& use) {
  const BytePlanes<4> planes(reinterpret_cast<const float*>(p.tables) + (r << kBits));
  const uint8_t* at = p.codes + lane_offset(Lanes::kRow, r);
  for (int64_t k = 0; k < p.columns; k += 16 * kUnitSteps<kBits>, at += kRowUnitBytes<kBits>) {
    const Unit<kBits> unit(at, 256, AsStored());
    repeat<kUnitSteps<kBits>>([&](auto s) {
      schedule_apart();
      float32x4_t values[4];
      planes.look_up(unit.template codes<s>(), values);
      use(k + 16 * s, values);
    });
  }
}

// One row times one output.
template <int kBits>
__attribute__((noinline)) void add_direct(const Piece& p, int r, const float* x, float* chains) {
  float32x4_t acc[4];
  repeat<4>([&](auto q) { acc[q] = vld1q_f32(chains + 4 * q); });
  for_row_values<kBits>(p, r, [&](int64_t k, const float32x4_t* values) {
    repeat<4>([&](auto q) { acc[q] = vfmaq_f32(acc[q], vld1q_f32(x + k + 4 * q), values[q]); });
  });
  repeat<4>([&](auto q) { vst1q_f32(chains + 4 * q, acc[q]); });
}

// Rows x four outputs, chains 4q..4q+3; chains is [row][output][16].
template <int kRows>
__attribute__((noinline)) void add_tile(const float* values, int64_t columns, const float* x,
                                        int64_t x_stride, float* chains) {
  for (int q = 0; q < 4; ++q) {
    float32x4_t acc[kRows * kQuad];
    const auto place = [&](int i) { return chains + i / kQuad * kChains + i % kQuad * 16 + 4 * q; };
    repeat<kRows * kQuad>([&](auto i) { acc[i] = vld1q_f32(place(i)); });
    for (int64_t k = 4 * q; k < columns; k += 16) {
      float32x4_t four[kRows];
      repeat<kRows>([&](auto r) { four[r] = vld1q_f32(x + r * x_stride + k); });
      repeat<kQuad>([&](auto c) {
        const float32x4_t w = vld1q_f32(values + c * kRowFloats + k);
        repeat<kRows>(
            [&](auto r) { acc[r * kQuad + c] = vfmaq_f32(acc[r * kQuad + c], four[r], w); });
      });
    }
    repeat<kRows * kQuad>([&](auto i) { vst1q_f32(place(i), acc[i]); });
  }
}

// All rows of a block in tiles of nearly equal height.
inline void add_rows(const float* values, int64_t columns, const float* x, int64_t x_stride,
                     int rows, float* chains) {
  constexpr decltype(&add_tile<1>) kTiles[] = {add_tile<1>, add_tile<2>, add_tile<3>, add_tile<4>};
  int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int i = 0, height; i < rows; i += height, --tiles) {
    height = (rows - i + tiles - 1) / tiles;
    kTiles[height - 1](values, columns, x + i * x_stride, x_stride, chains + i * kChains);
  }
}

template <int kBits>
__attribute__((noinline)) void unpack_row(const Piece& p, int r, float* values) {
  for_row_values<kBits>(p, r, [&](int64_t k, const float32x4_t* v) {
    repeat<4>([&](auto q) { vst1q_f32(values + k + 4 * q, v[q]); });
  });
}

// ((s_0 + s_1) + ...) + s_15 of four outputs.
inline float32x4_t fold(const float* chains) {
  float32x4_t sum = vdupq_n_f32(0.f);
  for (int q = 0; q < 4; ++q) {
    uint32x4_t rows[kQuad], lanes[4];
    for (int c = 0; c < kQuad; ++c)
      rows[c] = vreinterpretq_u32_f32(vld1q_f32(chains + 16 * c + 4 * q));
    transpose_dwords(rows, lanes);
    for (int l = 0; l < 4; ++l) {
      const float32x4_t chain = vreinterpretq_f32_u32(lanes[l]);
      sum = q + l ? vaddq_f32(sum, chain) : chain;
    }
  }
  return sum;
}

template <int kBits>
inline void compute_float_row(const Block& b) {
  const LinearJob& job = b.job;
  const Packed& w = *job.w;
  alignas(64) float values[kQuad * kRowFloats];
  alignas(64) float chains[kRowBlock * kChains];
  alignas(64) float sums[kRowBlock * kHalf];
  alignas(64) float acc[kRowBlock * kHalf];
  memset(acc, 0, sizeof(float) * (size_t)(b.rows * kHalf));
  const int64_t piece = b.rows == 1 ? kFloatChunk : kPiece;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t begin = 0; begin < padded; begin += kFloatChunk) {
      const int64_t end = min64(padded, begin + kFloatChunk);
      for (int quad = 0; quad < kHalf; quad += kQuad) {
        memset(chains, 0, sizeof(float) * (size_t)(b.rows * kChains));
        for (int64_t k = begin; k < end; k += piece) {
          const Piece p = piece_at(b, g, k, min64(piece, end - k));
          const float* x = job.x + b.m * job.x_stride + g * w.group_padded + k;
          for (int c = 0; c < kQuad; ++c)
            if (b.rows == 1)
              add_direct<kBits>(p, quad + c, x, chains + 16 * c);
            else
              unpack_row<kBits>(p, quad + c, values + c * kRowFloats);
          if (b.rows > 1) add_rows(values, p.columns, x, job.x_stride, b.rows, chains);
        }
        for (int i = 0; i < b.rows; ++i)
          vst1q_f32(sums + i * kHalf + quad, fold(chains + i * kChains));
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
