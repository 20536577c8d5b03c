// SPDX-License-Identifier: Apache-2.0
// Converters: from the words of a lane (layout.cuh) to the A operand of mma.sync. The chassis
// (linear.cuh) knows nothing else about a format. Every function runs on the host too.
//
// The four registers of the A operand of m16n8k16 and m16n8k32 in one lane, lane = 4 g + t:
//   a[0] row g, first half of the step    a[1] row g + 8, first half
//   a[2] row g, second half               a[3] row g + 8, second half        register = h + 2 half
// With 16-bit types a register holds s = 0, 1 (first half) or s = 2, 3; with int8 the four codes.
//
// All values are exact integers around zero (code - 2^(bits-1)); scales are applied to sums.
// Integer instructions per weight of a converter alone, counted in its source; what the whole main
// loop takes in machine code is measured and limited by tools/compile_check.py:
//
//   Int4<F16>   0.63   and-or x4, one shift per 8       + 0.5 packed fma
//   Int4<BF16>  0.88   and-or x4, three shifts per 8    + 0.5
//   Int8<F16>   0.50   prmt x4 per 8                    + 0.5
//   Int8<BF16>  1.25   and-or x2 and a shift per 2 pairs + 0.5
//   Pairs4      1.00   extract and address per pair      + 0.5 shared-memory loads
//   Table2      1.38   prmt: low and high bytes, then joined
//   Table3      1.56
//   Table4      2.63   two halves of the table per byte, then a choice by the top bit
//   Bytes8      0.25   Bytes4  0.38
#pragma once

#include "layout.cuh"

namespace qkern {
namespace cuda {

// What a lane reads for one step of the matrix unit, for all four 16-row tiles. `block` is the
// lane's first vector; vectors of a block are 32 apart.
template <int kWords>
struct StepWords {
  uint32_t tile[4][kWords];
};

// One vector with a word per tile.
template <int kWords>
QK_HD void load_word(const Vector* block, int vector, int word, StepWords<kWords>* w) {
  const Vector v = block[vector * 32];
#pragma unroll
  for (int i = 0; i < 4; ++i) w->tile[i][word] = v.word[i];
}
// Two vectors with two words per tile.
QK_HD void load_word_pairs(const Vector* block, int vector, StepWords<2>* w) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Vector v = block[(vector + half) * 32];
#pragma unroll
    for (int e = 0; e < 4; ++e) w->tile[2 * half + (e >> 1)][e & 1] = v.word[e];
  }
}

// ---- integers to 16-bit floats: the code becomes the low mantissa bits of a power of two, which a
// fused multiply-add then removes together with 2^(bits-1)

template <class T>
struct Int4 {
  using Type = T;
  static constexpr int kBits = 4, kWords = 1;
  static constexpr bool kBytes = false, kRowTables = false, kPairTable = false;
  static constexpr Order kOrder = Order::kSplit;

  QK_HD static StepWords<1> load(const Vector* block, int step) {
    StepWords<1> w;
    load_word(block, step, 0, &w);
    return w;
  }
  QK_HD static void fragment(const uint32_t* w, int, uint32_t* a) {
    const uint32_t x = w[0];
    if constexpr (T::kDtype == QK_F16) {
      // 1024 + q and, without a shift, 1024 + 16 q.
      const uint32_t y = x >> 8;
      a[0] = T::fma2((x & 0x000f000fu) | 0x64006400u, 0x3c003c00u, 0xe408e408u);  // * 1 - 1032
      a[1] = T::fma2((x & 0x00f000f0u) | 0x64006400u, 0x2c002c00u, 0xd480d480u);  // / 16 - 72
      a[2] = T::fma2((y & 0x000f000fu) | 0x64006400u, 0x3c003c00u, 0xe408e408u);
      a[3] = T::fma2((y & 0x00f000f0u) | 0x64006400u, 0x2c002c00u, 0xd480d480u);
    } else {
      // 128 + q: seven bits of mantissa leave room for the lowest nibble alone.
#pragma unroll
      for (int r = 0; r < 4; ++r)
        a[r] = T::fma2((x >> (4 * r) & 0x000f000fu) | 0x43004300u, 0x3f803f80u, 0xc308c308u);
    }
  }
};

template <class T>
struct Int8 {
  using Type = T;
  static constexpr int kBits = 8, kWords = 2;
  static constexpr bool kBytes = false, kRowTables = false, kPairTable = false;
  static constexpr Order kOrder = Order::kSplit;

  QK_HD static StepWords<2> load(const Vector* block, int step) {
    StepWords<2> w;
    load_word_pairs(block, 2 * step, &w);
    return w;
  }
  QK_HD static void fragment(const uint32_t* w, int, uint32_t* a) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t x = w[half];
      if constexpr (T::kDtype == QK_F16) {
        a[2 * half] = T::fma2(prmt(x, 0x64646464u, 0x4240u), 0x3c003c00u, 0xe480e480u);  // - 1152
        a[2 * half + 1] = T::fma2(prmt(x, 0x64646464u, 0x4341u), 0x3c003c00u, 0xe480e480u);
      } else {
        // 128 + (q & 127), minus 128 where the top bit of q is set and 256 where not.
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t y = x >> (8 * h);
          const uint32_t low = (y & 0x007f007fu) | 0x43004300u;
          const uint32_t base = (y & 0x00800080u) ^ 0x43804380u;
          a[2 * half + h] = T::fma2(base, 0xbf80bf80u, low);
        }
      }
    }
  }
};

// ---- four bits through one shared table of pairs: 256 entries of two 16-bit floats, 32 copies in
// shared memory (copy of a lane in the lane's bank), entry index = low code + 16 * high code

template <class T>
struct Pairs4 {
  using Type = T;
  static constexpr int kBits = 4, kWords = 1;
  static constexpr bool kBytes = false, kRowTables = false, kPairTable = true;
  static constexpr Order kOrder = Order::kAdjacent;
  static constexpr int kTableWords = 256 * 32;

  QK_HD static StepWords<1> load(const Vector* block, int step) {
    StepWords<1> w;
    load_word(block, step, 0, &w);
    return w;
  }
  // `table` is the lane's copy: entry e at table[32 e].
  QK_HD static void fragment(const uint32_t* w, const uint32_t* table, uint32_t* a) {
    const uint32_t x = w[0];
    a[0] = table[(x & 255u) * 32];
    a[2] = table[(x >> 8 & 255u) * 32];
    a[1] = table[(x >> 16 & 255u) * 32];
    a[3] = table[(x >> 24) * 32];
  }
};

// ---- tables in registers: a row's entries as 16-bit floats, their low bytes and their high bytes
// apart, 4 entries per word

template <int kBits_>
struct RowTable {
  static constexpr int kWords = 1 << kBits_ >> 2;
  uint32_t low[kWords], high[kWords];
};

// Builds the table out of the bit patterns of its entries.
template <int kBits>
QK_HD RowTable<kBits> make_row_table(const uint16_t* entries) {
  RowTable<kBits> t = {};
  for (int e = 0; e < 1 << kBits; ++e) {
    t.low[e / 4] |= (uint32_t)(entries[e] & 255) << (8 * (e % 4));
    t.high[e / 4] |= (uint32_t)(entries[e] >> 8) << (8 * (e % 4));
  }
  return t;
}

// Bytes that four selectors (codes in the low 16 bits of `codes`, one per nibble) choose.
template <int kBits>
QK_HD uint32_t choose(const uint32_t* bytes, uint32_t codes, uint32_t halves) {
  if constexpr (kBits == 2) return prmt(bytes[0], bytes[0], codes);
  if constexpr (kBits == 3) return prmt(bytes[0], bytes[1], codes);
  if constexpr (kBits == 4)
    return prmt(prmt(bytes[0], bytes[1], codes), prmt(bytes[2], bytes[3], codes), halves);
  return 0;
}

template <class T, int kBits_>
struct Table {
  using Type = T;
  static constexpr int kBits = kBits_, kWords = kBits == 3 ? 2 : 1;
  static constexpr bool kBytes = false, kRowTables = true, kPairTable = false;
  static constexpr Order kOrder = Order::kAdjacent;

  QK_HD static StepWords<kWords> load(const Vector* block, int step) {
    StepWords<kWords> w;
    load_word(block, kBits == 4 ? step : step >> 1, 0, &w);
    if constexpr (kBits == 3) load_word(block, 2, 1, &w);
    return w;
  }
  // `tables` of rows g and g + 8 of the tile.
  QK_HD static void fragment(const uint32_t* w, int step, const RowTable<kBits>* tables,
                             uint32_t* a) {
    uint32_t codes, halves = 0;  // a nibble per code: h = 0 in the low half, h = 1 in the high
    if constexpr (kBits == 4) {
      codes = w[0] & 0x77777777u;
      halves = (w[0] >> 1 & 0x44444444u) | 0x32103210u;
    } else {
      codes = w[0] >> (2 * (step & 1)) & 0x33333333u;
      if constexpr (kBits == 3) codes |= (step == 3 ? w[1] >> 1 : w[1] << (2 - step)) & 0x44444444u;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t low = choose<kBits>(tables[h].low, codes >> (16 * h), halves >> (16 * h));
      const uint32_t high = choose<kBits>(tables[h].high, codes >> (16 * h), halves >> (16 * h));
      a[h] = prmt(low, high, 0x5140u);
      a[2 + h] = prmt(low, high, 0x7362u);
    }
  }
};

// A table's entries as 16-bit floats. They are divided by the power of two that brings the largest
// magnitude into [1, 2), so that float16 loses no more than bfloat16 would; the result is that
// power. Entries that are not finite stay so. Small integers stay as they are (`integers`).
template <class T>
QK_HD float round_table(const float* table, int entries, bool integers, uint16_t* out) {
  uint32_t largest = 0;
  for (int e = 0; e < entries; ++e) {
    const uint32_t magnitude = float_as_bits(table[e]) & 0x7fffffffu;
    if (magnitude < 0x7f800000u && magnitude > largest) largest = magnitude;
  }
  int exponent = (int)(largest >> 23) - 127;
  if (integers || largest == 0) exponent = 0;
  if (exponent < -120) exponent = -120;
  if (exponent > 120) exponent = 120;
  const float down = bits_as_float((uint32_t)(127 - exponent) << 23);
  for (int e = 0; e < entries; ++e) out[e] = T::from_float(mul_rn(table[e], down));
  return bits_as_float((uint32_t)(127 + exponent) << 23);
}

// ---- bytes for m16n8k32. A step is 32 columns

struct Bytes8 {
  static constexpr int kBits = 8, kWords = 4, kShift = 0;
  static constexpr bool kBytes = true, kRowTables = false, kPairTable = false;
  static constexpr Order kOrder = Order::kByte;

  QK_HD static StepWords<4> load(const Vector* block, int step) {
    StepWords<4> w;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Vector v = block[(4 * step + i) * 32];
#pragma unroll
      for (int e = 0; e < 4; ++e) w.tile[i][e] = v.word[e];
    }
    return w;
  }
  QK_HD static void fragment(const uint32_t* w, int, uint32_t* a) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = w[r] ^ 0x80808080u;
  }
};

// 16 (code - 8): sums come out times 2^kShift, exactly.
struct Bytes4 {
  static constexpr int kBits = 4, kWords = 2, kShift = 4;
  static constexpr bool kBytes = true, kRowTables = false, kPairTable = false;
  static constexpr Order kOrder = Order::kByte;

  QK_HD static StepWords<2> load(const Vector* block, int step) {
    StepWords<2> w;
    load_word_pairs(block, 2 * step, &w);
    return w;
  }
  QK_HD static void fragment(const uint32_t* w, int, uint32_t* a) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[2 * half] = (w[half] << 4 & 0xf0f0f0f0u) ^ 0x80808080u;
      a[2 * half + 1] = (w[half] & 0xf0f0f0f0u) ^ 0x80808080u;
    }
  }
};

}  // namespace cuda
}  // namespace qkern
