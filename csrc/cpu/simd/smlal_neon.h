// SPDX-License-Identifier: Apache-2.0
// int8 products of armv8.0: smull and smlal make eight int16 products, sadalp adds neighbours to
// int32. As many products as fit are added in int16: 4 of codes below 64 (4 * 63 * 127 = 32004), 2
// of any bytes (2 * 128 * 127 = 32512).
//
// One row x 16 outputs at a time: 8 accumulators of two outputs x two partial sums each. For 16
// columns of narrow bytes 32 products, 8 sadalp, 16 loads of weights: one multiplication per cycle,
// which is what armv8.0 processors have, hides the loads. Two rows share those, but gcc 12 spills.
#pragma once

#include "int8_neon.h"

namespace qkern {
namespace {

inline int8x16_t broadcast_dword(const int8_t* at) {
  int32_t dword;
  memcpy(&dword, at, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(dword));
}

// kRun steps of one row: acc[2i] and acc[2i + 1] are of outputs 4i .. 4i + 3.
template <int kRun>
inline void add_run(const uint8_t* values, const int8_t* x, int32x4_t acc[8]) {
  int8x16_t dwords[kRun];
  repeat<kRun>([&](auto s) { dwords[s] = broadcast_dword(x + 4 * s); });
  repeat<4>([&](auto i) {
    int16x8_t low, high;
    repeat<kRun>([&](auto s) {
      const int8x16_t w =
          vld1q_s8(reinterpret_cast<const int8_t*>(values) + s * kStepBytes + 16 * i);
      const int8x8_t low_w = vget_low_s8(w), low_x = vget_low_s8(dwords[s]);
      low = s == 0 ? vmull_s8(low_w, low_x) : vmlal_s8(low, low_w, low_x);
      high = s == 0 ? vmull_high_s8(w, dwords[s]) : vmlal_high_s8(high, w, dwords[s]);
    });
    acc[2 * i] = vpadalq_s16(acc[2 * i], low);
    acc[2 * i + 1] = vpadalq_s16(acc[2 * i + 1], high);
  });
}

template <int kRun>
__attribute__((noinline)) void add_row(const uint8_t* values, int64_t steps, const int8_t* x,
                                       int32_t* sums) {
  int32x4_t acc[8];
  repeat<8>([&](auto i) { acc[i] = vdupq_n_s32(0); });
  for (; steps >= kRun; steps -= kRun, values += kRun * kStepBytes, x += 4 * kRun)
    add_run<kRun>(values, x, acc);
  if (kRun > 2 && steps > 0) add_run<2>(values, x, acc);
  repeat<4>([&](auto i) {
    const int32x4_t sum = vpaddq_s32(acc[2 * i], acc[2 * i + 1]);
    vst1q_s32(sums + 4 * i, vaddq_s32(vld1q_s32(sums + 4 * i), sum));
  });
}

struct Smlal {
  using Order = ByFours;
  static constexpr int kDirectRows = 0;  // the scratch costs one load and store for 16 bytes

  template <int kLargest>
  static void add_rows(const uint8_t* values, int64_t steps, const Rows& rows, int32_t* sums) {
    for (int i = 0; i < rows.count; ++i)
      add_row<(kLargest < 64 ? 4 : 2)>(values, steps, rows.row(i), sums + i * kHalf);
  }
};

}  // namespace
}  // namespace qkern
