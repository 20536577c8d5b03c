// SPDX-License-Identifier: Apache-2.0
// Converters through tables in registers, for 16-bit floats and for bytes: one permute of bytes
// (prmt) looks up four codes of three bits at once.
//
// A table is kept as its entries' low bytes and high bytes apart (bytes: one of them), 4 per word.
// Four neighbouring nibbles of a word are four codes of one row (Order::kAdjacent and kLookup), so
// that they select without being moved. 16 entries take two lookups, by the low three bits, and a
// third permute that chooses between them by the top bit. Shifts are products (bits.cuh).
//
// The same converter serves a table per row (and per tensor, and plain integers: code - 2^(b-1)),
// which stays in registers, and one per group or tile, which the chassis loads for every block.
//
// Integer instructions per 8 weights (products are left out):
//
//   Table4       18   and, and-or: selectors; 4 lookups, 2 choices, 2 joins per row
//   Table3       10   and, and-or: selectors; 2 lookups, 2 joins per row
//   Table2        6   and: selectors of 4; one permute per pair, as 4 whole entries are 8 bytes
//   ByteTable4    8   and, and-or: selectors; 2 lookups, 1 choice per row
//   ByteTable3    4   and, and-or: selectors; 1 lookup per row
//   ByteTable2    3   and: selectors; 1 lookup per row
//
// Ways to a cheaper Table4, counted and left. A multiprocessor of 8.0 or 9.0 issues 4 instructions
// of a warp per clock, 2 of them integer, 1 access to shared memory. Table4 has 18 integer and 21
// issued: 9.0 clocks. That a register of a result comes out of the 8 words of a table makes 16
// permutes the fewest, so only another source of entries can be better.
//
//   words of two whole entries     28 integer: 4 lookups and 3 choices per pair of weights
//   raw codes                      17: prmt turns the top bit into 0 where an entry's sign is 0, so
//                                  that an or chooses; entries of 14 bits alone
//   both halves of a table are     17: the matrix unit adds what the top bit chose; twice the joins
//     multiplied                   and products, entries of 14 bits again
//   16-bit fixed point, a product  22: both bytes of an entry have to become floats
//     per byte
//   warp shuffles                  8 of them take 8.0 alone; besides 8 addresses and 4 joins
//   entries in shared memory, a    8 and-or, 8 loads, 12 products: 9.0 with the load of the codes,
//     copy in each lane's bank     and 16 KB per 64 rows. With half of the weights each way 6.5,
//                                  but 24.5 issued: on an H200 the issue slots, which permit 71 %
//                                  of the memory's speed now, then permit 65 %
//   pairs of entries per row in    4 and-or, 4 loads; 64 KB per 64 rows leave no room for copies:
//     shared memory                2.9 lanes want one bank on average, 11.6
#pragma once

#include "convert.cuh"

namespace qkern {
namespace cuda {

template <int kBits_, int kEntryBytes_>
struct RowTable {
  static constexpr int kBits = kBits_, kEntryBytes = kEntryBytes_;
  static constexpr int kWords = 1 << kBits >> 2;
  uint32_t bytes[kEntryBytes][kWords];  // low, high
};

// Builds the table out of the bit patterns of its entries.
template <class Registers>
QK_HD Registers make_row_table(const uint16_t* entries) {
  Registers t = {};
  for (int e = 0; e < 1 << Registers::kBits; ++e)
    for (int b = 0; b < Registers::kEntryBytes; ++b)
      t.bytes[b][e / 4] |= (uint32_t)(entries[e] >> (8 * b) & 255) << (8 * (e % 4));
  return t;
}

// Entries as 16-bit floats. They are divided by the power of two that brings the largest magnitude
// into [1, 2), so that float16 loses no more than bfloat16 would; the result is that power. Entries
// that are not finite stay so. What float16 holds exactly (`exact`) stays as it is.
template <class T>
QK_HD float round_table(const float* table, int entries, bool exact, uint16_t* out) {
  uint32_t largest = 0;
  for (int e = 0; e < entries; ++e) {
    const uint32_t magnitude = float_as_bits(table[e]) & 0x7fffffffu;
    if (magnitude < 0x7f800000u && magnitude > largest) largest = magnitude;
  }
  int exponent = (int)(largest >> 23) - 127;
  if (exact || largest == 0) exponent = 0;
  if (exponent < -120) exponent = -120;
  if (exponent > 120) exponent = 120;
  const float down = bits_as_float((uint32_t)(127 - exponent) << 23);
  for (int e = 0; e < entries; ++e) out[e] = T::from_float(mul_rn(table[e], down));
  return bits_as_float((uint32_t)(127 + exponent) << 23);
}
// Entries as bytes: integers in -128..127.
template <>
QK_HD float round_table<S8>(const float* table, int entries, bool, uint16_t* out) {
  for (int e = 0; e < entries; ++e) out[e] = (uint16_t)((int)table[e] & 255);
  return 1.f;
}

// Selectors of the eight codes of columns j, a nibble each: h = 0 in the low 16 bits, h = 1 above.
struct Selectors {
  uint32_t codes, halves;  // halves: with 16 entries, which of two lookups
};
template <int kBits>
QK_HD Selectors selectors(uint32_t low, uint32_t high, int j) {
  if constexpr (kBits == 4)
    return {low & 0x77777777u, and_or(shift_right<1>(low), 0x44444444u, 0x32103210u)};
  const uint32_t two = (j & 1 ? shift_right<2>(low) : low) & 0x33333333u;
  const uint32_t third = j == 0   ? high << 2
                         : j == 1 ? high << 1
                         : j == 2 ? high
                                  : shift_right<1>(high);
  if constexpr (kBits == 3) return {and_or(third, 0x44444444u, two), 0};
  return {two, 0};
}

// Bytes that the four selectors in the low halves choose.
template <int kBits>
QK_HD uint32_t choose(const uint32_t* bytes, uint32_t codes, uint32_t halves) {
  if constexpr (kBits == 2) return prmt(bytes[0], bytes[0], codes);
  if constexpr (kBits == 3) return prmt(bytes[0], bytes[1], codes);
  if constexpr (kBits == 4)
    return prmt(prmt(bytes[0], bytes[1], codes), prmt(bytes[2], bytes[3], codes), halves);
  return 0;
}

template <class T, int kBits_, Tables kTables_>
struct Table {
  using Type = T;
  using Registers = RowTable<kBits_, 2>;
  static constexpr int kBits = kBits_, kWords = kBits == 3 ? 2 : 1;
  static constexpr bool kBytes = false;
  static constexpr Tables kTables = kTables_;
  static constexpr Order kOrder = Order::kAdjacent;

  QK_HD static StepWords<kWords> load(const Vector* block, int step) {
    StepWords<kWords> w;
    load_word(block, kBits == 4 ? step : step >> 1, 0, &w);
    if constexpr (kBits == 3) load_word(block, 2, 1, &w);
    return w;
  }
  // `tables` of rows g and g + 8 of the tile.
  QK_HD static void fragment(const uint32_t* w, int step, const Registers* tables, uint32_t* a) {
    if constexpr (kBits == 2) return whole_entries(w[0], step, tables, a);
    const Selectors s = selectors<kBits>(w[0], w[kWords - 1], step);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t codes = h ? shift_right<16>(s.codes) : s.codes;
      const uint32_t halves = h ? shift_right<16>(s.halves) : s.halves;
      const uint32_t low = choose<kBits>(tables[h].bytes[0], codes, halves);
      const uint32_t high = choose<kBits>(tables[h].bytes[1], codes, halves);
      a[h] = prmt(low, high, 0x5140u);
      a[2 + h] = prmt(low, high, 0x7362u);
    }
  }

 private:
  // Four entries are eight bytes, of which one permute takes two entries: for code c bytes c and
  // 4 + c, out of a selector of eight bits per code.
  QK_HD static void whole_entries(uint32_t x, int step, const Registers* tables, uint32_t* a) {
    const uint32_t y = step & 1 ? shift_right<2>(x) : x;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t codes = (half ? shift_right<4>(y) : y) & 0x03030303u;
      const uint32_t select = codes * 0x11u + 0x40404040u;
      a[2 * half] = prmt(tables[0].bytes[0][0], tables[0].bytes[1][0], select);
      a[2 * half + 1] = prmt(tables[1].bytes[0][0], tables[1].bytes[1][0], shift_right<16>(select));
    }
  }
};

// For m16n8k32: a step is 32 columns, j = 2 step + half.
template <int kBits_, Tables kTables_>
struct ByteTable {
  using Type = S8;
  using Registers = RowTable<kBits_, 1>;
  static constexpr int kBits = kBits_, kWords = kBits == 2 ? 1 : 2, kShift = 0;
  static constexpr bool kBytes = true;
  static constexpr Tables kTables = kTables_;
  static constexpr Order kOrder = Order::kLookup;

  QK_HD static StepWords<kWords> load(const Vector* block, int step) {
    StepWords<kWords> w;
    load_word(block, kBits == 4 ? 2 * step : step, 0, &w);
    if constexpr (kBits == 4) load_word(block, 2 * step + 1, 1, &w);
    if constexpr (kBits == 3) load_word(block, 2, 1, &w);
    return w;
  }
  QK_HD static void fragment(const uint32_t* w, int step, const Registers* tables, uint32_t* a) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Selectors s =
          selectors<kBits>(w[kBits == 4 ? half : 0], w[kWords - 1], 2 * step + half);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        a[h + 2 * half] = choose<kBits>(tables[h].bytes[0], h ? shift_right<16>(s.codes) : s.codes,
                                        h ? shift_right<16>(s.halves) : s.halves);
    }
  }
};

// The tables of a lane's eight rows, out of the block tables of their row tile and group: the 32
// lanes of a load read 8 neighbouring parts, or one.
template <class Registers>
QK_HD void load_tables(const uint8_t* from, int g, bool shared, Registers* tables) {
  constexpr int kBytes = sizeof(Registers), kPart = kBytes < 16 ? kBytes : 16;
#pragma unroll
  for (int r = 0; r < 8; ++r)
#pragma unroll
    for (int at = 0; at < kBytes; at += kPart) {
      const uint8_t* const part = from + table_byte(kBytes, r, g, shared, at);
      uint32_t* const to = &tables[r].bytes[0][0] + at / 4;
      if constexpr (kPart == 16) {
        const Vector v = *(const Vector*)part;
#pragma unroll
        for (int e = 0; e < 4; ++e) to[e] = v.word[e];
      } else if constexpr (kPart == 8) {
        const uint64_t v = *(const uint64_t*)part;
        to[0] = (uint32_t)v;
        to[1] = (uint32_t)(v >> 32);
      } else {
        to[0] = *(const uint32_t*)part;
      }
    }
}

}  // namespace cuda
}  // namespace qkern
