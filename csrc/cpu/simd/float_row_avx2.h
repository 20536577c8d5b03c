// SPDX-License-Identifier: Apache-2.0
// y = x . W^T in float32 with a table per row or per group (row lanes).
//
// The contract has sixteen chains per output and chunk, column k in chain k mod 16, so that a
// register holds eight columns of one output and activations are loaded, not broadcast. The four
// outputs c, 4 + c, 8 + c, 12 + c of a panel, whose codes share cache lines, are unpacked to floats
// for a whole chunk (16 KiB); a tile of 3 rows x 2 outputs keeps 12 accumulators, 2 weights and 1
// activation in registers, one of 1 row x 4 outputs 8 accumulators. The sixteen chains of four
// outputs are folded in order after a transposition.
#pragma once

#include "walk_avx2.h"

namespace qkern {
namespace {

constexpr int kQuad = 4;      // outputs unpacked together
constexpr int kTileRows = 3;  // rows of a tile

// Chains of outputs [0, kOutputs) and rows [0, kRows): lanes[row][output][16].
template <int kRows, int kOutputs>
inline void add_chains(const float* values, int64_t columns, const float* x, int64_t x_stride,
                       float* lanes) {
  __m256 acc[kRows * kOutputs * 2];
  repeat<kRows * kOutputs * 2>([&](int i) { acc[i] = _mm256_setzero_ps(); });
  for (int64_t k = 0; k < columns; k += 16)
    repeat<2>([&](int part) {
      __m256 w[kOutputs];
      repeat<kOutputs>(
          [&](int o) { w[o] = _mm256_load_ps(values + o * kFloatChunk + k + 8 * part); });
      repeat<kRows>([&](int r) {
        const __m256 some = _mm256_loadu_ps(x + r * x_stride + k + 8 * part);
        repeat<kOutputs>([&](int o) {
          const int i = (r * kOutputs + o) * 2 + part;
          acc[i] = _mm256_fmadd_ps(some, w[o], acc[i]);
        });
      });
    });
  repeat<kRows * kOutputs * 2>([&](int i) {
    _mm256_store_ps(lanes + (i / 2 / kOutputs * kQuad + i / 2 % kOutputs) * 16 + i % 2 * 8, acc[i]);
  });
}

// ((s_0 + s_1) + ...) + s_15 of four outputs.
inline __m128 fold(const float* lanes) {
  __m128 sum = _mm_setzero_ps();
  for (int part = 0; part < 4; ++part) {
    __m128 s0 = _mm_load_ps(lanes + 4 * part), s1 = _mm_load_ps(lanes + 16 + 4 * part);
    __m128 s2 = _mm_load_ps(lanes + 32 + 4 * part), s3 = _mm_load_ps(lanes + 48 + 4 * part);
    _MM_TRANSPOSE4_PS(s0, s1, s2, s3);
    sum = part ? _mm_add_ps(sum, s0) : s0;
    sum = _mm_add_ps(_mm_add_ps(_mm_add_ps(sum, s1), s2), s3);
  }
  return sum;
}

// Sums of four outputs of all rows: sums + row * 16 gets four floats.
inline void sum_quad(const float* values, int64_t columns, const float* x, int64_t x_stride,
                     int rows, float* sums) {
  alignas(64) float lanes[kTileRows * kQuad * 16];
  constexpr int64_t kPair = 2 * kFloatChunk;
  for (int i = 0, step; i < rows; i += step) {
    step = (int)min64(kTileRows, rows - i);
    if (step == 1) {
      add_chains<1, 4>(values, columns, x, x_stride, lanes);
    } else if (step == 2) {
      add_chains<2, 2>(values, columns, x, x_stride, lanes);
      add_chains<2, 2>(values + kPair, columns, x, x_stride, lanes + 32);
    } else {
      add_chains<3, 2>(values, columns, x, x_stride, lanes);
      add_chains<3, 2>(values + kPair, columns, x, x_stride, lanes + 32);
    }
    for (int r = 0; r < step; ++r, sums += kHalf) _mm_store_ps(sums, fold(lanes + r * kQuad * 16));
    x += step * x_stride;
  }
}

// From [quad c][lane l], output 4l + c, to output order.
inline void order_outputs(float* sums) {
  __m128 s0 = _mm_load_ps(sums), s1 = _mm_load_ps(sums + 4);
  __m128 s2 = _mm_load_ps(sums + 8), s3 = _mm_load_ps(sums + 12);
  _MM_TRANSPOSE4_PS(s0, s1, s2, s3);
  _mm_store_ps(sums, s0);
  _mm_store_ps(sums + 4, s1);
  _mm_store_ps(sums + 8, s2);
  _mm_store_ps(sums + 12, s3);
}

// Outputs c, 4 + c, 8 + c, 12 + c of a piece to values[4][kFloatChunk].
template <int kBits>
inline void unpack_quad(const Piece& p, int c, float* values) {
  constexpr int kSteps = kUnitSteps<kBits>, kUnitColumns = 16 * kSteps;
  const float* tables = reinterpret_cast<const float*>(p.tables);
  for (int half = 0; half < 2; ++half) {  // 16-byte lanes 2 half, 2 half + 1
    const Table<kBits> even(tables + (8 * half + c) * 16), odd(tables + (8 * half + 4 + c) * 16);
    const uint8_t* at = p.codes + 64 * c + 32 * half;
    float* out = values + 2 * half * kFloatChunk;
    for (int64_t k = 0; k < p.columns; k += kUnitColumns, at += kRowUnitBytes<kBits>) {
      // The lines of the next quad, or of what follows the piece.
      if (half == 0) prefetch_ahead(at, kRowUnitBytes<kBits>);
      for (int s = 0; s < kSteps; ++s, out += 16) {
        alignas(32) uint8_t codes[32];
        store256(codes, unit_codes<kBits, 256>(at, s));
        _mm256_store_ps(out, even.template at<0>(bytes_to_dwords(codes)));
        _mm256_store_ps(out + 8, even.template at<0>(bytes_to_dwords(codes + 8)));
        _mm256_store_ps(out + kFloatChunk, odd.template at<0>(bytes_to_dwords(codes + 16)));
        _mm256_store_ps(out + kFloatChunk + 8, odd.template at<0>(bytes_to_dwords(codes + 24)));
      }
    }
  }
}

template <int kBits>
inline void compute_float_row(const Block& b) {
  const LinearJob& job = b.job;
  const Packed& w = *job.w;
  alignas(64) float values[kQuad * kFloatChunk];
  alignas(64) float sums[2 * kRowBlock * kHalf];
  alignas(64) float acc[2 * kRowBlock * kHalf];
  memset(acc, 0, sizeof(float) * (size_t)(b.streams * b.rows * kHalf));
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t begin = 0; begin < padded; begin += kFloatChunk) {
      const int64_t columns = min64(kFloatChunk, padded - begin);
      const float* x = job.x + b.m * job.x_stride + g * w.group_padded + begin;
      for (int s = 0; s < b.streams; ++s) {
        float* of_stream = sums + s * b.rows * kHalf;
        const Piece p = piece_at(b, s, g, begin, columns);
        for (int c = 0; c < kQuad; ++c) {
          unpack_quad<kBits>(p, c, values);
          sum_quad(values, columns, x, job.x_stride, b.rows, of_stream + 4 * c);
        }
        for (int i = 0; i < b.rows; ++i) order_outputs(of_stream + i * kHalf);
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
