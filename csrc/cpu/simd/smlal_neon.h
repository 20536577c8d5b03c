// SPDX-License-Identifier: Apache-2.0
// int8 products of armv8.0: smull and smlal make eight int16 products, sadalp adds neighbours to
// int32. As many products as fit are added in int16: 4 of codes below 64 (4 * 63 * 127 = 32004), 2
// of any bytes (2 * 128 * 127 = 32512).
//
// A tile is 2 rows x 16 outputs, 16 accumulators of two outputs x two partial sums each, and 8
// dwords of activations: for 16 columns, 64 products, 16 sadalp and 24 loads (narrow).
#pragma once

#include "int8_neon.h"

namespace qkern {
namespace {

inline int8x16_t broadcast_dword(const int8_t* at) {
  int32_t dword;
  memcpy(&dword, at, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(dword));
}

// kRun steps: accumulators of row r are acc[8r ..], of outputs 4i..4i+3 acc[8r + 2i] and the next.
template <int kRun, int kRows>
inline void add_run(const uint8_t* values, const int8_t* const x[kRows], int64_t k,
                    int32x4_t acc[8 * kRows]) {
  int8x16_t dword[kRows][kRun];
  repeat<kRows>([&](auto r) {
    repeat<kRun>([&](auto s) { dword[r][s] = broadcast_dword(x[r] + k + 4 * s); });
  });
  repeat<4>([&](auto i) {
    int16x8_t low[kRows], high[kRows];
    repeat<kRun>([&](auto s) {
      const int8x16_t w =
          vld1q_s8(reinterpret_cast<const int8_t*>(values) + s * kStepBytes + 16 * i);
      repeat<kRows>([&](auto r) {
        const int8x16_t d = dword[r][s];
        low[r] = s == 0 ? vmull_s8(vget_low_s8(w), vget_low_s8(d))
                        : vmlal_s8(low[r], vget_low_s8(w), vget_low_s8(d));
        high[r] = s == 0 ? vmull_high_s8(w, d) : vmlal_high_s8(high[r], w, d);
      });
    });
    repeat<kRows>([&](auto r) {
      acc[8 * r + 2 * i] = vpadalq_s16(acc[8 * r + 2 * i], low[r]);
      acc[8 * r + 2 * i + 1] = vpadalq_s16(acc[8 * r + 2 * i + 1], high[r]);
    });
  });
}

template <int kRun, int kRows>
__attribute__((noinline)) void add_tile(const uint8_t* values, int64_t steps, const Rows& rows,
                                        int row, int32_t* sums) {
  int32x4_t acc[8 * kRows];
  const int8_t* x[kRows];
  repeat<8 * kRows>([&](auto i) { acc[i] = vdupq_n_s32(0); });
  repeat<kRows>([&](auto r) { x[r] = rows.row(row + r); });
  int64_t step = 0;
  for (; step + kRun <= steps; step += kRun, values += kRun * kStepBytes)
    add_run<kRun, kRows>(values, x, 4 * step, acc);
  if (kRun > 2 && step < steps) add_run<2, kRows>(values, x, 4 * step, acc);
  repeat<kRows>([&](auto r) {
    int32_t* at = sums + (row + r) * kHalf;
    repeat<4>([&](auto i) {
      const int32x4_t sum = vpaddq_s32(acc[8 * r + 2 * i], acc[8 * r + 2 * i + 1]);
      vst1q_s32(at + 4 * i, vaddq_s32(vld1q_s32(at + 4 * i), sum));
    });
  });
}

struct Smlal {
  using Order = ByFours;
  static constexpr int kDirectRows = 0;  // the scratch costs one load and store for 16 bytes

  template <int kLargest>
  static void add_rows(const uint8_t* values, int64_t steps, const Rows& rows, int32_t* sums) {
    constexpr int kRun = kLargest < 64 ? 4 : 2;
    int i = 0;
    for (; i + 2 <= rows.count; i += 2) add_tile<kRun, 2>(values, steps, rows, i, sums);
    if (i < rows.count) add_tile<kRun, 1>(values, steps, rows, i, sums);
  }
};

}  // namespace
}  // namespace qkern
