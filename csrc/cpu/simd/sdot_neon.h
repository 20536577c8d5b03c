// SPDX-License-Identifier: Apache-2.0
// int8 products of FEAT_DotProd: sdot adds four products to each int32 lane. Dword lanes take
// activations by lane, four columns each of sixteen in a register; row lanes take sixteen columns
// as they lie, and the four partial sums of an output are added at the end of a piece.
//
// Up to 4 rows need no scratch: 4 bits, one row, 8 columns of a half: 4 loads of codes, 8
// instructions to take them apart, 8 sdot. A tile is 4 rows x 16 outputs: 16 accumulators, for 16
// columns 64 sdot and 20 loads.
#pragma once

#if !defined(__ARM_FEATURE_DOTPROD)
#error "this header needs -march=armv8.2-a+dotprod"
#endif

#include "int8_neon.h"

namespace qkern {
namespace {

template <class Format, int kRows>
__attribute__((noinline)) void add_direct_dwords(const Piece& p, int half, const Rows& rows,
                                                 int32_t* sums) {
  constexpr int kBits = Format::kBits, kSteps = kUnitSteps<kBits>;
  const Format convert(p.tables);
  const uint8_t* at = p.codes + half * kDwordUnitBytes<kBits>;
  const int64_t bytes = p.halves * kDwordUnitBytes<kBits>;
  int32x4_t acc[4 * kRows];
  repeat<4 * kRows>([&](auto i) { acc[i] = vld1q_s32(sums + 4 * i); });
  for (int64_t k = 0; k < p.columns; k += 4 * kSteps, at += bytes)
    repeat<(kSteps + 3) / 4>([&](auto four) {  // four steps to a register of activations
      constexpr int kFirst = 4 * four, kCount = kSteps < 4 ? kSteps : 4;
      int8x16_t x[kRows];
      repeat<kRows>([&](auto r) { x[r] = vld1q_s8(rows.row(r) + k + 4 * kFirst); });
      repeat<4>([&](auto i) {
        if (kSteps > 2) schedule_apart();
        const Unit<kBits> unit(at + 16 * i, 64, AsStored());
        repeat<kCount>([&](auto s) {
          if (kSteps > 4 && kRows > 3) schedule_apart();
          const int8x16_t w = convert(unit.template codes<kFirst + s>());
          repeat<kRows>(
              [&](auto r) { acc[4 * r + i] = vdotq_laneq_s32(acc[4 * r + i], w, x[r], s); });
        });
      });
    });
  repeat<4 * kRows>([&](auto i) { vst1q_s32(sums + 4 * i, acc[i]); });
}

// Outputs 4 place .. 4 place + 3.
template <class Format, int kRows>
__attribute__((noinline)) void add_direct_rows(const Piece& p, int place, const Rows& rows,
                                               int32_t* sums) {
  constexpr int kBits = Format::kBits, kSteps = kUnitSteps<kBits>;
  const auto at = [&](const uint8_t* from, int r) {
    return from + lane_offset(Lanes::kRow, 4 * place + r);
  };
  const Format convert[4] = {Format(at(p.tables, 0)), Format(at(p.tables, 1)),
                             Format(at(p.tables, 2)), Format(at(p.tables, 3))};
  int32x4_t acc[4 * kRows];
  repeat<4 * kRows>([&](auto i) { acc[i] = vdupq_n_s32(0); });
  const uint8_t* codes = p.codes;
  for (int64_t k = 0; k < p.columns; k += 16 * kSteps, codes += kRowUnitBytes<kBits>)
    repeat<kSteps>([&](auto s) {
      int8x16_t x[kRows];
      repeat<kRows>([&](auto r) { x[r] = vld1q_s8(rows.row(r) + k + 16 * s); });
      repeat<4>([&](auto c) {
        if (kRows > 2 || kSteps > 4) schedule_apart();
        const int8x16_t w =
            convert[c](Unit<kBits>(at(codes, c), 256, AsStored()).template codes<s>());
        repeat<kRows>([&](auto r) { acc[4 * r + c] = vdotq_s32(acc[4 * r + c], w, x[r]); });
      });
    });
  repeat<kRows>([&](auto r) {
    int32_t* to = sums + r * kHalf + 4 * place;
    const int32x4_t sum = vpaddq_s32(vpaddq_s32(acc[4 * r], acc[4 * r + 1]),
                                     vpaddq_s32(acc[4 * r + 2], acc[4 * r + 3]));
    vst1q_s32(to, vaddq_s32(vld1q_s32(to), sum));
  });
}

template <class Format, int kRows>
inline void add_direct(const Piece& p, int half, const Rows& rows, int32_t* sums) {
  if constexpr (Format::kLanes == Lanes::kDword)
    add_direct_dwords<Format, kRows>(p, half, rows, sums);
  else
    for (int place = 0; place < 4; ++place) add_direct_rows<Format, kRows>(p, place, rows, sums);
}

// Rows x 16 outputs, kSteps steps from column k on.
template <int kRows, int kSteps>
inline void add_steps(const uint8_t* values, const Rows& rows, int row, int64_t k,
                      int32x4_t acc[4 * kRows]) {
  int8x16_t x[kRows];
  repeat<kRows>([&](auto r) { x[r] = vld1q_s8(rows.row(row + r) + k); });
  repeat<kSteps>([&](auto s) {
    if (kRows == 4) schedule_apart();
    repeat<4>([&](auto i) {
      const int8x16_t w =
          vld1q_s8(reinterpret_cast<const int8_t*>(values) + s * kStepBytes + 16 * i);
      repeat<kRows>([&](auto r) { acc[4 * r + i] = vdotq_laneq_s32(acc[4 * r + i], w, x[r], s); });
    });
  });
}

template <int kRows>
__attribute__((noinline)) void add_tile(const uint8_t* values, int64_t steps, const Rows& rows,
                                        int row, int32_t* sums) {
  int32x4_t acc[4 * kRows];
  sums += row * kHalf;
  repeat<4 * kRows>([&](auto i) { acc[i] = vld1q_s32(sums + 4 * i); });
  int64_t step = 0;
  for (; step + 4 <= steps; step += 4)
    add_steps<kRows, 4>(values + step * kStepBytes, rows, row, 4 * step, acc);
  if (step < steps) add_steps<kRows, 2>(values + step * kStepBytes, rows, row, 4 * step, acc);
  repeat<4 * kRows>([&](auto i) { vst1q_s32(sums + 4 * i, acc[i]); });
}

struct Sdot {
  using Order = ByFours;
  static constexpr int kDirectRows = 4;

  template <class Format>
  static void add_direct(const Piece& p, int half, const Rows& rows, int32_t* sums) {
    constexpr decltype(&qkern::add_direct<Format, 1>) kCounts[] = {
        qkern::add_direct<Format, 1>, qkern::add_direct<Format, 2>, qkern::add_direct<Format, 3>,
        qkern::add_direct<Format, 4>};
    kCounts[rows.count - 1](p, half, rows, sums);
  }

  // Tiles of nearly equal height.
  template <int>
  static void add_rows(const uint8_t* values, int64_t steps, const Rows& rows, int32_t* sums) {
    constexpr decltype(&add_tile<1>) kTiles[] = {add_tile<1>, add_tile<2>, add_tile<3>,
                                                 add_tile<4>};
    int tiles = (rows.count + 3) / 4;
    for (int i = 0, height; i < rows.count; i += height, --tiles) {
      height = (rows.count - i + tiles - 1) / tiles;
      kTiles[height - 1](values, steps, rows, i, sums);
    }
  }
};

}  // namespace
}  // namespace qkern
