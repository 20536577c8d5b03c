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
// Integer instructions per weight of each converter, counted in its source; products and
// multiply-adds run on other lanes (bits.cuh) and are left out. tools/compile_check.py holds the
// whole main loop to these plus 1.3 for the chassis; SASS.md has what it measured in the machine
// code of every architecture, and the share of the memory's speed that it permits.
//
//   Int4<F16>    0.50   and-or x4 per 8                    + 0.5 packed fma, one shift in 8
//   Int4<BF16>   0.50   and-or x4 per 8                    + 0.5 packed fma, three shifts in 8
//   Int8<F16>    0.50   prmt x4 per 8                      + 0.5 packed fma
//   Int8<BF16>   1.00   and-or and and-xor per pair        + 0.5 packed fma, two shifts in 8
//   Pairs4       0.50   and-or of the address per pair     + 0.5 loads, 0.5 shifts
//   Bytes8       0.25   xor per 4
//   Bytes4       0.38   shift, and-xor x2 per 8
//
// Through tables in registers (convert_tables.cuh): Table2 0.75, Table3 1.25, Table4 2.25,
// ByteTable2 0.38, ByteTable3 0.50, ByteTable4 1.00.
#pragma once

#include "layout.cuh"

namespace qkern {
namespace cuda {

// Where a converter finds its table.
enum class Tables {
  kNone,
  kPairs,  // one for the whole weight: pairs of entries in shared memory
  kRows,   // one per row, in registers from the first step to the last
  kBlocks  // one per row (or 8 rows) and group, loaded into registers for each block
};

// What a lane reads for one step of the matrix unit, for all four 16-row tiles. `block` is the
// lane's first vector; vectors of a block are 32 apart.
template <int kWords>
struct StepWords {
  uint32_t tile[4][kWords];
};

// A vector with a word per tile, after `word` others.
template <int kWords>
QK_HD void load_word(const Vector* block, int vector, int word, StepWords<kWords>* w) {
  const Vector v = block[vector * 32];
#pragma unroll
  for (int i = 0; i < 4; ++i) w->tile[i][word] = v.word[i];
}
QK_HD StepWords<1> load_words(const Vector* block, int vector) {
  StepWords<1> w;
  load_word(block, vector, 0, &w);
  return w;
}
// Two vectors with two words per tile.
QK_HD StepWords<2> load_word_pairs(const Vector* block, int vector) {
  StepWords<2> w;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Vector v = block[(vector + half) * 32];
#pragma unroll
    for (int e = 0; e < 4; ++e) w.tile[2 * half + (e >> 1)][e & 1] = v.word[e];
  }
  return w;
}

// ---- integers to 16-bit floats: the code becomes the low mantissa bits of a power of two, which a
// fused multiply-add then removes together with 2^(bits-1)

template <class T>
struct Int4 {
  using Type = T;
  static constexpr int kBits = 4, kWords = 1;
  static constexpr bool kBytes = false;
  static constexpr Tables kTables = Tables::kNone;
  static constexpr Order kOrder = Order::kSplit;

  QK_HD static StepWords<1> load(const Vector* block, int step) { return load_words(block, step); }
  QK_HD static void fragment(const uint32_t* w, int, uint32_t* a) {
    const uint32_t x = w[0];
    if constexpr (T::kDtype == QK_F16) {
      // 1024 + q and, without a shift, 1024 + 16 q.
      const uint32_t y = shift_right<8>(x);
      a[0] = T::fma2(and_or(x, 0x000f000fu, 0x64006400u), 0x3c003c00u, 0xe408e408u);  // * 1 - 1032
      a[1] = T::fma2(and_or(x, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);  // / 16 - 72
      a[2] = T::fma2(and_or(y, 0x000f000fu, 0x64006400u), 0x3c003c00u, 0xe408e408u);
      a[3] = T::fma2(and_or(y, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);
    } else {
      // 128 + q: seven bits of mantissa leave room for the lowest nibble alone.
      const uint32_t y[4] = {x, shift_right<4>(x), shift_right<8>(x), shift_right<12>(x)};
#pragma unroll
      for (int r = 0; r < 4; ++r)
        a[r] = T::fma2(and_or(y[r], 0x000f000fu, 0x43004300u), 0x3f803f80u, 0xc308c308u);
    }
  }
};

template <class T>
struct Int8 {
  using Type = T;
  static constexpr int kBits = 8, kWords = 2;
  static constexpr bool kBytes = false;
  static constexpr Tables kTables = Tables::kNone;
  static constexpr Order kOrder = Order::kSplit;

  QK_HD static StepWords<2> load(const Vector* block, int step) {
    return load_word_pairs(block, 2 * step);
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
          const uint32_t y = h ? shift_right<8>(x) : x;
          const uint32_t low = and_or(y, 0x007f007fu, 0x43004300u);
          const uint32_t base = and_xor(y, 0x00800080u, 0x43804380u);
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
  static constexpr bool kBytes = false;
  static constexpr Tables kTables = Tables::kPairs;
  static constexpr Order kOrder = Order::kAdjacent;
  static constexpr int kTableWords = 256 * 32;

  QK_HD static StepWords<1> load(const Vector* block, int step) { return load_words(block, step); }
  // Entry e of the copy of a lane lies at byte 128 e + 4 lane.
  QK_HD static void fragment(const uint32_t* w, const uint8_t* table, int lane, uint32_t* a) {
    const uint32_t x = w[0], copy = 4u * (uint32_t)lane;
    a[0] = *(const uint32_t*)(table + and_or(x << 7, 0x7f80u, copy));
    a[2] = *(const uint32_t*)(table + and_or(shift_right<1>(x), 0x7f80u, copy));
    a[1] = *(const uint32_t*)(table + and_or(shift_right<9>(x), 0x7f80u, copy));
    a[3] = *(const uint32_t*)(table + and_or(shift_right<17>(x), 0x7f80u, copy));
  }
};

// ---- bytes for m16n8k32. A step is 32 columns

struct Bytes8 {
  static constexpr int kBits = 8, kWords = 4, kShift = 0;
  static constexpr bool kBytes = true;
  static constexpr Tables kTables = Tables::kNone;
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
  static constexpr bool kBytes = true;
  static constexpr Tables kTables = Tables::kNone;
  static constexpr Order kOrder = Order::kByte;

  QK_HD static StepWords<2> load(const Vector* block, int step) {
    return load_word_pairs(block, 2 * step);
  }
  QK_HD static void fragment(const uint32_t* w, int, uint32_t* a) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[2 * half] = and_xor(w[half] << 4, 0xf0f0f0f0u, 0x80808080u);
      a[2 * half + 1] = and_xor(w[half], 0xf0f0f0f0u, 0x80808080u);
    }
  }
};

}  // namespace cuda
}  // namespace qkern
