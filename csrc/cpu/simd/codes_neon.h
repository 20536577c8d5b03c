// SPDX-License-Identifier: Apache-2.0
// Packed planes (layout.h) to codes, one byte each, and tables of floats as planes of bytes.
//
// A 64-byte block is four registers. A register of dword lanes is four outputs x four columns, one
// of row lanes one output x sixteen columns. Planes split bytes into bits, so that a permutation of
// bytes may as well come before the planes are taken apart: once per register, not per step.
#pragma once

#include "half_neon.h"

namespace qkern {
namespace {

// A step is as many columns as a lane has bytes: 4 (dword) or 16 (row).
template <int kBits>
constexpr int kUnitSteps = kBits == 8   ? 1
                           : kBits == 4 ? 2
                           : kBits % 2  ? 8
                                        : 4;
template <int kBits>
constexpr int kDwordUnitBytes = kUnitSteps<kBits> * 4 * kHalf * kBits / 8;
template <int kBits>
constexpr int kRowUnitBytes = kUnitSteps<kBits> * 16 * kHalf * kBits / 8;

// Field kField of every byte, fields of kBits bits, low bits first.
template <int kBits, int kField>
inline uint8x16_t field(uint8x16_t bytes) {
  constexpr int kShift = kBits * kField;
  if constexpr (kShift > 0) bytes = vshrq_n_u8(bytes, kShift);
  if constexpr (kShift + kBits < 8) bytes = vandq_u8(bytes, vdupq_n_u8((1 << kBits) - 1));
  return bytes;
}

struct AsStored {
  uint8x16_t operator()(uint8x16_t bytes) const { return bytes; }
};

// Dword lanes with byte 4r + j (output r, column j) moved to 4j + r.
struct ColumnsFirst {
  uint8x16_t operator()(uint8x16_t bytes) const {
    const uint8x16_t order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    return vqtbl1q_u8(bytes, order);
  }
};

// One register's place in the blocks of a unit.
template <int kBits>
struct Unit {
  static constexpr bool kSplit = kBits == 3 || kBits == 5 || kBits == 6;
  static constexpr int kLow = !kSplit ? kBits : kBits > 4 ? 4 : 2;
  static constexpr int kFields = 8 / kLow, kLowBlocks = kUnitSteps<kBits> / kFields;
  uint8x16_t low[kLowBlocks], high;

  // `at` is the place in the unit's first block; blocks are block_bytes apart.
  template <class Order>
  Unit(const uint8_t* at, int block_bytes, const Order& order) {
    repeat<kLowBlocks>([&](auto i) { low[i] = order(vld1q_u8(at + i * block_bytes)); });
    high = kSplit ? order(vld1q_u8(at + kLowBlocks * block_bytes)) : low[0];
  }

  template <int kStep>
  uint8x16_t codes() const {
    const uint8x16_t first = field<kLow, kStep % kFields>(low[kStep / kFields]);
    if constexpr (!kSplit) {
      return first;
    } else {
      const uint8x16_t second = field<kBits - kLow, kStep>(high);
      return vsliq_n_u8(first, second, kLow);
    }
  }
};

// in[r] holds four dwords of row r; out[d] gets dword d of the four rows.
inline void transpose_dwords(const uint32x4_t in[4], uint32x4_t out[4]) {
  const uint64x2_t even01 = vreinterpretq_u64_u32(vtrn1q_u32(in[0], in[1]));
  const uint64x2_t even23 = vreinterpretq_u64_u32(vtrn1q_u32(in[2], in[3]));
  const uint64x2_t odd01 = vreinterpretq_u64_u32(vtrn2q_u32(in[0], in[1]));
  const uint64x2_t odd23 = vreinterpretq_u64_u32(vtrn2q_u32(in[2], in[3]));
  out[0] = vreinterpretq_u32_u64(vtrn1q_u64(even01, even23));
  out[1] = vreinterpretq_u32_u64(vtrn1q_u64(odd01, odd23));
  out[2] = vreinterpretq_u32_u64(vtrn2q_u64(even01, even23));
  out[3] = vreinterpretq_u32_u64(vtrn2q_u64(odd01, odd23));
}

// A table of sixteen floats as planes of bytes: one tbl per plane looks up sixteen codes, zips put
// the bytes together. Floats whose low halves are 0 (integers up to 8 bits) need two planes only.
template <int kPlanes>
struct BytePlanes {
  static_assert(kPlanes == 2 || kPlanes == 4, "the upper half of a float, or all of it");
  uint8x16_t plane[kPlanes];

  // Reads 64 bytes; entries that no code means are never looked up.
  explicit BytePlanes(const float* table) {
    const uint8x16x4_t bytes = vld4q_u8(reinterpret_cast<const uint8_t*>(table));
    repeat<kPlanes>([&](auto i) { plane[i] = bytes.val[4 - kPlanes + i]; });
  }

  // Register q: the floats of bytes 4q..4q+3.
  void look_up(uint8x16_t codes, float32x4_t values[4]) const {
    if constexpr (kPlanes == 2) {
      const uint8x16_t b0 = vqtbl1q_u8(plane[0], codes), b1 = vqtbl1q_u8(plane[1], codes);
      const uint16x8_t low = vreinterpretq_u16_u8(vzip1q_u8(b0, b1));
      const uint16x8_t high = vreinterpretq_u16_u8(vzip2q_u8(b0, b1));
      values[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(low), 16));
      values[1] = vreinterpretq_f32_u32(vshll_high_n_u16(low, 16));
      values[2] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(high), 16));
      values[3] = vreinterpretq_f32_u32(vshll_high_n_u16(high, 16));
    } else {
      const uint8x16_t b0 = vqtbl1q_u8(plane[0], codes), b1 = vqtbl1q_u8(plane[1], codes);
      const uint8x16_t b2 = vqtbl1q_u8(plane[2], codes), b3 = vqtbl1q_u8(plane[3], codes);
      const uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(b0, b1));
      const uint16x8_t high01 = vreinterpretq_u16_u8(vzip2q_u8(b0, b1));
      const uint16x8_t low23 = vreinterpretq_u16_u8(vzip1q_u8(b2, b3));
      const uint16x8_t high23 = vreinterpretq_u16_u8(vzip2q_u8(b2, b3));
      values[0] = vreinterpretq_f32_u16(vzip1q_u16(low01, low23));
      values[1] = vreinterpretq_f32_u16(vzip2q_u16(low01, low23));
      values[2] = vreinterpretq_f32_u16(vzip1q_u16(high01, high23));
      values[3] = vreinterpretq_f32_u16(vzip2q_u16(high01, high23));
    }
  }
};

}  // namespace
}  // namespace qkern
