// SPDX-License-Identifier: Apache-2.0
// int8 products of FEAT_I8MM: smmla multiplies two rows x 8 columns with two outputs x 8 columns
// and adds to a 2 x 2 square, 32 products where sdot has 16.
//
// A tile is 4 rows x 16 outputs: 16 squares, for 8 columns 16 smmla and 12 loads. The last of an
// odd number of rows is multiplied with itself. Up to 4 rows go the way of sdot_neon.h: a scratch
// by eights costs a zip, a store and a load for every 16 bytes, and from registers 4 rows would
// take 8 instructions instead of 10, 2 rows as many.
#pragma once

#if !defined(__ARM_FEATURE_MATMUL_INT8)
#error "this header needs -march=armv8.2-a+dotprod+i8mm"
#endif

#include "sdot_neon.h"

namespace qkern {
namespace {

// Rows `row` .. row + 2 kPairs - 1, as far as they exist.
template <int kPairs>
__attribute__((noinline)) void add_squares(const uint8_t* values, int64_t steps, const Rows& rows,
                                           int row, int32_t* sums) {
  const int8_t* x[2 * kPairs];
  int32x4_t acc[8 * kPairs];
  repeat<2 * kPairs>([&](auto r) { x[r] = rows.row((int)min64(row + r, rows.count - 1)); });
  repeat<8 * kPairs>([&](auto i) { acc[i] = vdupq_n_s32(0); });
  for (const uint8_t* end = values + steps * kStepBytes; values < end; values += 2 * kStepBytes) {
    int8x16_t two[kPairs];
    repeat<kPairs>([&](auto p) {
      two[p] = vcombine_s8(vld1_s8(x[2 * p]), vld1_s8(x[2 * p + 1]));
      x[2 * p] += 8;
      x[2 * p + 1] += 8;
    });
    repeat<8>([&](auto i) {
      const int8x16_t w = vld1q_s8(reinterpret_cast<const int8_t*>(values) + 16 * i);
      repeat<kPairs>([&](auto p) { acc[8 * p + i] = vmmlaq_s32(acc[8 * p + i], two[p], w); });
    });
  }
  const auto add = [&](int r, int i, int64x2_t sum) {
    int32_t* at = sums + (row + r) * kHalf + 4 * i;
    vst1q_s32(at, vaddq_s32(vld1q_s32(at), vreinterpretq_s32_s64(sum)));
  };
  repeat<kPairs>([&](auto p) {
    repeat<4>([&](auto i) {
      const int64x2_t a = vreinterpretq_s64_s32(acc[8 * p + 2 * i]);
      const int64x2_t b = vreinterpretq_s64_s32(acc[8 * p + 2 * i + 1]);
      if (row + 2 * p < rows.count) add(2 * p, i, vzip1q_s64(a, b));
      if (row + 2 * p + 1 < rows.count) add(2 * p + 1, i, vzip2q_s64(a, b));
    });
  });
}

struct Smmla : Sdot {
  using Order = ByEights;

  template <int>
  static void add_rows(const uint8_t* values, int64_t steps, const Rows& rows, int32_t* sums) {
    int i = 0;
    for (; i + 2 < rows.count; i += 4) add_squares<2>(values, steps, rows, i, sums);
    if (i < rows.count) add_squares<1>(values, steps, rows, i, sums);
  }
};

}  // namespace
}  // namespace qkern
