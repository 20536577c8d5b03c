// SPDX-License-Identifier: Apache-2.0
// y = x . W^T in float32 for dword lanes (Int, one table per tensor), all of it but the values.
//
// A register of weights holds one column of four outputs; activations are multiplied by lane, four
// columns in a register. One chain of fused multiply-adds per output, columns ascending, is the
// contract: fmla rounds once, so that the bits are those of fmaf.
//
//   one row: codes become values in registers and are used once. The four chains of a half are as
//     long as the making of its values: 4 fmla of latency 4 against some 50 instructions.
//   more rows: the codes of a piece become floats in a scratch of the first cache, [half][column]
//     [16 outputs], once for all rows of the block. A tile is 4 rows x 1 half: 16 accumulators, 4
//     activations, 4 weights; 20 loads for 64 fmla. A chain that a piece interrupts goes on through
//     memory, which changes no bit.
//
// Run under emulation only: speed was judged by the instructions of the loops.
#pragma once

#include "walk_neon.h"

namespace qkern {
namespace {

constexpr int64_t kRowBlock = 64;                // rows whose sums stay in the first cache
constexpr int64_t kPiece = 64;                   // columns that are unpacked at a time
constexpr int64_t kHalfFloats = kPiece * kHalf;  // 4 KiB of scratch per half
constexpr int kTileRows = 4;

// Lane kColumn of x times a column of weights.
template <int kColumn>
inline float32x4_t add_column(float32x4_t acc, float32x4_t weights, float32x4_t x) {
  return vfmaq_laneq_f32(acc, weights, x, kColumn);
}

// Rows x one half. Columns come in whole fours.
template <int kRows>
__attribute__((noinline)) void add_tile(const float* values, int64_t columns, const float* x,
                                        int64_t x_stride, float* sums) {
  float32x4_t acc[4 * kRows];
  repeat<4 * kRows>([&](auto i) { acc[i] = vld1q_f32(sums + 4 * i); });
  for (int64_t k = 0; k < columns; k += 4, values += 4 * kHalf) {
    float32x4_t four[kRows];
    repeat<kRows>([&](auto r) { four[r] = vld1q_f32(x + r * x_stride + k); });
    repeat<4>([&](auto j) {
      if (kRows == kTileRows) schedule_apart();
      repeat<4>([&](auto i) {
        const float32x4_t w = vld1q_f32(values + j * kHalf + 4 * i);
        repeat<kRows>([&](auto r) { acc[4 * r + i] = add_column<j>(acc[4 * r + i], w, four[r]); });
      });
    });
  }
  repeat<4 * kRows>([&](auto i) { vst1q_f32(sums + 4 * i, acc[i]); });
}

// All rows of a block times one half of a piece, in tiles of nearly equal height.
inline void add_rows(const float* values, int64_t columns, const float* x, int64_t x_stride,
                     int rows, float* sums) {
  constexpr decltype(&add_tile<1>) kTiles[] = {add_tile<1>, add_tile<2>, add_tile<3>, add_tile<4>};
  int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int i = 0, height; i < rows; i += height, --tiles) {
    height = (rows - i + tiles - 1) / tiles;
    kTiles[height - 1](values, columns, x + i * x_stride, x_stride, sums + i * kHalf);
  }
}

// One row times one half of a piece, without scratch. Units of the half are `step` bytes apart.
template <class Format>
__attribute__((noinline)) void add_direct(const Format& format, const uint8_t* at, int64_t step,
                                          int64_t columns, const float* x, float* sums) {
  constexpr int kBits = Format::kBits;
  constexpr int kTogether = Unit<kBits>::kSplit ? 1 : Format::kTogether;
  const Format f = format;
  float32x4_t acc[4];
  repeat<4>([&](auto i) { acc[i] = vld1q_f32(sums + 4 * i); });
  for (const float* end = x + columns; x < end; x += 4 * kUnitSteps<kBits>, at += step) {
    const Unit<kBits> unit[4] = {{at, 64, ColumnsFirst()},
                                 {at + 16, 64, ColumnsFirst()},
                                 {at + 32, 64, ColumnsFirst()},
                                 {at + 48, 64, ColumnsFirst()}};
    repeat<kUnitSteps<kBits>>([&](auto s) {
      const float32x4_t four = vld1q_f32(x + 4 * s);
      repeat<4>([&](auto i) {
        if (i % kTogether == 0) schedule_apart();
        float32x4_t v[4];
        f.values(unit[i].template codes<s>(), v);
        repeat<4>([&](auto j) { acc[i] = add_column<j>(acc[i], v[j], four); });
      });
    });
  }
  repeat<4>([&](auto i) { vst1q_f32(sums + 4 * i, acc[i]); });
}

// The values of one half of a piece.
template <class Format>
inline void unpack(const Format& format, const uint8_t* at, int64_t step, int64_t columns,
                   float* values) {
  constexpr int kBits = Format::kBits;
  const Format f = format;
  for (int64_t k = 0; k < columns; k += 4 * kUnitSteps<kBits>, at += step)
    repeat<4>([&](auto i) {
      const Unit<kBits> unit(at + 16 * i, 64, ColumnsFirst());
      repeat<kUnitSteps<kBits>>([&](auto s) {
        float32x4_t v[4];
        f.values(unit.template codes<s>(), v);
        repeat<4>([&](auto j) { vst1q_f32(values + (k + 4 * s + j) * kHalf + 4 * i, v[j]); });
      });
    });
}

// Format: kBits; kTogether, how many registers of codes may become values at once without spills;
// made from the weight; values(codes, v): v[j] are the floats of bytes 4j..4j+3.
template <class Format>
inline void compute_float(const Block& b) {
  const LinearJob& job = b.job;
  const Packed& w = *job.w;
  const Format format(w);
  alignas(64) float values[kHalfFloats];
  alignas(64) float sums[2 * kRowBlock * kHalf];
  alignas(64) float acc[2 * kRowBlock * kHalf];
  const size_t bytes = sizeof(float) * (size_t)(b.halves() * b.rows * kHalf);
  const int64_t piece = b.rows == 1 ? kFloatChunk : kPiece;
  memset(acc, 0, bytes);
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t begin = 0; begin < padded; begin += kFloatChunk) {
      const int64_t end = min64(padded, begin + kFloatChunk);
      memset(sums, 0, bytes);
      for (int64_t k = begin; k < end; k += piece) {
        const Piece p = piece_at(b, g, k, min64(piece, end - k));
        const float* x = job.x + b.m * job.x_stride + g * w.group_padded + k;
        const int64_t step = p.halves * kDwordUnitBytes<Format::kBits>;
        for (int half = 0; half < p.halves; ++half) {
          const uint8_t* codes = p.codes + half * kDwordUnitBytes<Format::kBits>;
          float* of_half = sums + half * b.rows * kHalf;
          if (b.rows == 1) {
            add_direct(format, codes, step, p.columns, x, of_half);
            continue;
          }
          unpack(format, codes, step, p.columns, values);
          add_rows(values, p.columns, x, job.x_stride, b.rows, of_half);
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

// Codes of at most 4 bits minus the symmetric zero (or nothing): a table like any other, of which
// two planes are enough; 8 instructions for 16 values, where arithmetic takes 10.
template <int kCodeBits>
struct FloatSmallInt {
  static constexpr int kBits = kCodeBits, kTogether = 4;
  BytePlanes<2> planes;

  struct Integers {
    float entry[16];
    explicit Integers(int offset) {
      for (int i = 0; i < 16; ++i) entry[i] = (float)(i - offset);
    }
  };

  explicit FloatSmallInt(const Packed& w) : planes(Integers(code_offset(w)).entry) {}

  void values(uint8x16_t codes, float32x4_t v[4]) const { planes.look_up(codes, v); }
};

// Wider codes: zipped under the upper half of 2^23 a code is 2^23 + code; an exact subtraction
// takes the power and the zero off. scvtf would do it too, but at a quarter of the rate.
template <int kCodeBits>
struct FloatWideInt {
  static constexpr int kBits = kCodeBits, kTogether = 4;
  float32x4_t power;  // 2^23 plus the zero

  explicit FloatWideInt(const Packed& w) : power(vdupq_n_f32(0x1p23f + (float)code_offset(w))) {}

  float32x4_t minus_power(uint16x8_t zipped) const {
    return vsubq_f32(vreinterpretq_f32_u16(zipped), power);
  }

  void values(uint8x16_t codes, float32x4_t v[4]) const {
    const uint16x8_t upper = vdupq_n_u16(0x4b00);
    const uint16x8_t low = vmovl_u8(vget_low_u8(codes)), high = vmovl_high_u8(codes);
    v[0] = minus_power(vzip1q_u16(low, upper));
    v[1] = minus_power(vzip2q_u16(low, upper));
    v[2] = minus_power(vzip1q_u16(high, upper));
    v[3] = minus_power(vzip2q_u16(high, upper));
  }
};

// One table of at most 16 entries for the whole tensor.
template <int kCodeBits>
struct FloatTable {
  static constexpr int kBits = kCodeBits, kTogether = 2;
  BytePlanes<4> planes;

  explicit FloatTable(const Packed& w) : planes(static_cast<const float*>(w.table)) {}

  void values(uint8x16_t codes, float32x4_t v[4]) const { planes.look_up(codes, v); }
};

}  // namespace
}  // namespace qkern
