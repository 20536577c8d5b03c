// SPDX-License-Identifier: Apache-2.0
// y = x . W^T in float32 for dword lanes (Int, one table per tensor), all of it but the values.
//
// The codes of a piece become floats in a scratch of the first cache, [half][column][16 outputs],
// once for all rows of the block. A tile of rows x halves then walks the columns in ascending
// order: a register of weights holds one column of eight outputs, an activation is broadcast. One
// chain of fused multiply-adds per output is the contract, so that a tile needs at least eight
// registers of outputs to hide the latency of 4 at two per cycle: 6 rows x 1 half (12 accumulators,
// 2 weights, 1 activation) or, for one row, 4 halves of two panels. A chain that a piece interrupts
// goes on through memory, which changes no bit.
#pragma once

#include "walk_avx2.h"

namespace qkern {
namespace {

constexpr int64_t kPiece = 64;                   // columns that are unpacked at a time
constexpr int64_t kHalfFloats = kPiece * kHalf;  // 4 KiB of scratch per half
constexpr int kTogether = 4;                     // halves that share the scratch, for one row
constexpr int kTileRows = 6;

template <int kRows, int kHalves>
inline void add_tile(const float* values, int64_t columns, const float* x, int64_t x_stride,
                     float* sums, int64_t sums_stride) {
  __m256 acc[kRows * kHalves * 2];
  repeat<kRows * kHalves * 2>([&](int i) {
    acc[i] =
        _mm256_loadu_ps(sums + i / 2 % kRows * kHalf + i / 2 / kRows * sums_stride + i % 2 * 8);
  });
  for (int64_t k = 0; k < columns; ++k, values += kHalf)
    repeat<kHalves>([&](int h) {
      const __m256 w0 = _mm256_loadu_ps(values + h * kHalfFloats);
      const __m256 w1 = _mm256_loadu_ps(values + h * kHalfFloats + 8);
      repeat<kRows>([&](int r) {
        const __m256 one = _mm256_broadcast_ss(x + r * x_stride + k);
        const int i = 2 * (h * kRows + r);
        acc[i] = _mm256_fmadd_ps(one, w0, acc[i]);
        acc[i + 1] = _mm256_fmadd_ps(one, w1, acc[i + 1]);
      });
    });
  repeat<kRows * kHalves * 2>([&](int i) {
    _mm256_storeu_ps(sums + i / 2 % kRows * kHalf + i / 2 / kRows * sums_stride + i % 2 * 8,
                     acc[i]);
  });
}

// `rows` of at most kTileRows times `halves` of scratch; few rows take several halves at once.
template <int kRows>
inline void add_halves(const float* values, int halves, int64_t columns, const float* x,
                       int64_t x_stride, float* sums, int64_t sums_stride) {
  constexpr int kAtOnce = kRows == 1 ? 4 : kRows <= 3 ? 2 : 1;
  int h = 0;
  for (; h + kAtOnce <= halves; h += kAtOnce)
    add_tile<kRows, kAtOnce>(values + h * kHalfFloats, columns, x, x_stride, sums + h * sums_stride,
                             sums_stride);
  for (; h < halves; ++h)
    add_tile<kRows, 1>(values + h * kHalfFloats, columns, x, x_stride, sums + h * sums_stride,
                       sums_stride);
}

// All rows of a block in tiles of nearly equal height.
inline void add_rows(const float* values, int halves, int64_t columns, const float* x,
                     int64_t x_stride, int rows, float* sums, int64_t sums_stride) {
  int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int i = 0, step; i < rows; i += step) {
    step = (rows - i + tiles - 1) / tiles;
    --tiles;
    const float* at = x + i * x_stride;
    float* out = sums + i * kHalf;
    switch (step) {
      case 1:
        add_halves<1>(values, halves, columns, at, x_stride, out, sums_stride);
        break;
      case 2:
        add_halves<2>(values, halves, columns, at, x_stride, out, sums_stride);
        break;
      case 3:
        add_halves<3>(values, halves, columns, at, x_stride, out, sums_stride);
        break;
      case 4:
        add_halves<4>(values, halves, columns, at, x_stride, out, sums_stride);
        break;
      case 5:
        add_halves<5>(values, halves, columns, at, x_stride, out, sums_stride);
        break;
      default:
        add_halves<6>(values, halves, columns, at, x_stride, out, sums_stride);
    }
  }
}

// Format: made from the weight; unpack(piece, values) fills values + half * kHalfFloats.
template <class Format>
inline void compute_float(const Block& b) {
  const LinearJob& job = b.job;
  const Packed& w = *job.w;
  const Format format(w);
  alignas(64) float values[kTogether * kHalfFloats];
  alignas(64) float sums[2 * kRowBlock * kHalf];
  alignas(64) float acc[2 * kRowBlock * kHalf];
  const int64_t half_floats = b.rows * kHalf;
  const size_t bytes = sizeof(float) * (size_t)(b.half_count() * half_floats);
  const int together = b.rows == 1 ? kTogether / 2 : 1;  // panels
  memset(acc, 0, bytes);
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t begin = 0; begin < padded; begin += kFloatChunk) {
      const int64_t end = min64(padded, begin + kFloatChunk);
      memset(sums, 0, bytes);
      for (int64_t k = begin; k < end; k += kPiece) {
        const int64_t columns = min64(kPiece, end - k);
        const float* x = job.x + b.m * job.x_stride + g * w.group_padded + k;
        for (int s = 0; s < b.streams; s += together) {
          int halves = 0;
          for (int t = s; t < s + together && t < b.streams; ++t) {
            const Piece p = piece_at(b, t, g, k, columns);
            format.unpack(p, values + halves * kHalfFloats);
            halves += p.halves;
          }
          add_rows(values, halves, columns, x, job.x_stride, b.rows, sums + 2 * s * half_floats,
                   half_floats);
        }
      }
      end_float_chunk(b, g, g * job.chunks_per_group + begin / kFloatChunk, sums, acc);
    }
  }
  finish_block(b, acc);
}

template <class Format>
inline void linear_float(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  walk(job, m0, m1, p0, p1, kRowBlock, [](const Block& b) { compute_float<Format>(b); });
}

// ---- formats ----

inline float* column_at(float* values, int half, int64_t step, int v) {
  return values + half * kHalfFloats + 4 * step * kHalf + 8 * v;
}

// Codes minus the symmetric zero (or nothing): the code goes into the mantissa of a power of two
// at the place where its byte lies, and a subtraction, exact, takes the power off. No shift for
// three of four columns, and no conversion, which shares its ports with the multiplications.
template <int kBits>
struct FloatInt {
  __m256 low, middle, high;  // powers of two plus the zero

  explicit FloatInt(const Packed& w) {
    const float zero = (float)code_offset(w);
    low = _mm256_set1_ps(0x1p23f + zero);
    middle = _mm256_set1_ps(0x1p15f + zero);
    high = _mm256_set1_ps(0x1p7f + zero);
  }

  static __m256 with_exponent(__m256i bits, int exponent) {
    const __m256i power = _mm256_set1_epi32((127 + exponent) << 23);
    return _mm256_castsi256_ps(_mm256_or_si256(bits, power));
  }

  void unpack(const Piece& p, float* values) const {
    for_dword_codes<kBits>(p, [&](int half, int64_t step, int v, __m256i codes) {
      float* at = column_at(values, half, step, v);
      const auto byte = [](__m256i c, int i) {
        return _mm256_and_si256(c, _mm256_set1_epi32(0xff << (8 * i)));
      };
      const __m256 v0 = _mm256_sub_ps(with_exponent(byte(codes, 0), 23), low);
      const __m256 v1 = _mm256_sub_ps(with_exponent(byte(codes, 1), 15), middle);
      // Bit 23 does not fit a mantissa: a code of 8 bits moves down a byte.
      const __m256 v2 =
          kBits == 8
              ? _mm256_sub_ps(with_exponent(byte(_mm256_srli_epi32(codes, 8), 1), 15), middle)
              : _mm256_sub_ps(with_exponent(byte(codes, 2), 7), high);
      const __m256 v3 = _mm256_sub_ps(with_exponent(_mm256_srli_epi32(codes, 24), 23), low);
      _mm256_store_ps(at, v0);
      _mm256_store_ps(at + kHalf, v1);
      _mm256_store_ps(at + 2 * kHalf, v2);
      _mm256_store_ps(at + 3 * kHalf, v3);
    });
  }
};

// One table of at most 16 entries for the whole tensor.
template <int kBits>
struct FloatTable {
  Table<kBits> table;

  explicit FloatTable(const Packed& w) : table(static_cast<const float*>(w.table)) {}

  void unpack(const Piece& p, float* values) const {
    const Table<kBits> t = table;
    for_dword_codes<kBits>(p, [&](int half, int64_t step, int v, __m256i codes) {
      float* at = column_at(values, half, step, v);
      _mm256_store_ps(at, t.template at<0>(codes));
      _mm256_store_ps(at + kHalf, t.template at<8>(codes));
      _mm256_store_ps(at + 2 * kHalf, t.template at<16>(codes));
      _mm256_store_ps(at + 3 * kHalf, t.template at<24>(codes));
    });
  }
};

}  // namespace
}  // namespace qkern
