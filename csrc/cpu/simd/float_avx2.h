// SPDX-License-Identifier: Apache-2.0
// y = x . W^T in float32 for dword lanes (Int, one table per tensor), all of it but the values.
//
// A register of weights holds one column of eight outputs, an activation is broadcast. One chain of
// fused multiply-adds per output, columns ascending, is the contract.
//
//   one row: codes become values in registers and are used once, the four registers of a panel's
//     outputs next to each other; making a value takes as long as the latency of its chain.
//   more rows: the codes of a piece become floats in a scratch of the first cache, [half][column]
//     [16 outputs], once for all rows of the block. A tile is 6 rows x 1 half: 12 accumulators, 2
//     weights, 1 activation, 8 loads for 12 multiply-adds. A chain that a piece interrupts goes on
//     through memory, which changes no bit.
//
// Rows of activations a multiple of 4 KiB apart halve the speed of a tile (48 instead of 110 GFLOPS
// on Zen 4): loads whose addresses agree in the low 12 bits do not run in the same cycle.
#pragma once

#include "walk_avx2.h"

namespace qkern {
namespace {

constexpr int64_t kPiece = 64;                   // columns that are unpacked at a time
constexpr int64_t kHalfFloats = kPiece * kHalf;  // 4 KiB of scratch per half
constexpr int kTileRows = 6;

// Not inlined: between the constants of a format gcc finds no registers for the accumulators.
template <int kRows>
__attribute__((noinline)) void add_tile(const float* values, int64_t columns, const float* x,
                                        int64_t x_stride, float* sums) {
  __m256 acc[kRows * 2];
  repeat<kRows * 2>([&](int i) { acc[i] = _mm256_load_ps(sums + 8 * i); });
  for (int64_t k = 0; k < columns; ++k, values += kHalf) {
    const __m256 w0 = _mm256_load_ps(values), w1 = _mm256_load_ps(values + 8);
    repeat<kRows>([&](int r) {
      const __m256 one = _mm256_broadcast_ss(x + r * x_stride + k);
      acc[2 * r] = _mm256_fmadd_ps(one, w0, acc[2 * r]);
      acc[2 * r + 1] = _mm256_fmadd_ps(one, w1, acc[2 * r + 1]);
    });
  }
  repeat<kRows * 2>([&](int i) { _mm256_store_ps(sums + 8 * i, acc[i]); });
}

// All rows of a block times one half of a piece, in tiles of nearly equal height.
inline void add_rows(const float* values, int64_t columns, const float* x, int64_t x_stride,
                     int rows, float* sums) {
  constexpr decltype(&add_tile<1>) kTiles[] = {add_tile<1>, add_tile<2>, add_tile<3>,
                                               add_tile<4>, add_tile<5>, add_tile<6>};
  int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int i = 0, height; i < rows; i += height, --tiles) {
    height = (rows - i + tiles - 1) / tiles;
    kTiles[height - 1](values, columns, x + i * x_stride, x_stride, sums + i * kHalf);
  }
}

// One row times a piece of one or two halves, without scratch.
template <class Format, int kHalves>
__attribute__((noinline)) void add_direct(const Format& format, const Piece& p, const float* x,
                                          float* sums) {
  constexpr int kBits = Format::kBits, kBytes = kDwordUnitBytes<kBits>;
  Format f = format;
  f.enter(p);
  __m256 acc[2 * kHalves];
  repeat<2 * kHalves>([&](int i) { acc[i] = _mm256_load_ps(sums + 8 * i); });
  const uint8_t* at = p.codes;
  for (int64_t k = 0; k < p.columns; at += kHalves * kBytes) {
    prefetch_ahead(at, kHalves * kBytes);
    for (int s = 0; s < kUnitSteps<kBits>; ++s, k += 4) {
      __m256i codes[2 * kHalves];
      repeat<2 * kHalves>(
          [&](int i) { codes[i] = unit_codes<kBits, 64>(at + i / 2 * kBytes + i % 2 * 32, s); });
      f.template add_columns<2 * kHalves>(codes, x + k, acc);
    }
  }
  repeat<2 * kHalves>([&](int i) { _mm256_store_ps(sums + 8 * i, acc[i]); });
}

template <class Format>
inline void unpack(const Format& format, const Piece& p, float* values) {
  Format f = format;
  f.enter(p);
  for_dword_codes<Format::kBits>(p, [&](int half, int64_t step, int v, __m256i codes) {
    float* at = values + half * kHalfFloats + 4 * step * kHalf + 8 * v;
    __m256 columns[4];
    f.values(2 * half + v, codes, columns);
    for (int j = 0; j < 4; ++j) _mm256_store_ps(at + j * kHalf, columns[j]);
  });
}

// Format: kBits; made from the weight; enter(piece): what follows is about this piece; values(i,
// codes, v): v[j] are the floats of byte j of each dword, the codes those of register i of a panel.
template <class Format>
inline void compute_float(const Block& b) {
  const LinearJob& job = b.job;
  const Packed& w = *job.w;
  const Format format(w);
  alignas(64) float values[2 * kHalfFloats];
  alignas(64) float sums[2 * kRowBlock * kHalf];
  alignas(64) float acc[2 * kRowBlock * kHalf];
  const size_t bytes = sizeof(float) * (size_t)(b.half_count() * b.rows * kHalf);
  const int64_t piece = b.rows == 1 ? kFloatChunk : kPiece;
  memset(acc, 0, bytes);
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t begin = 0; begin < padded; begin += kFloatChunk) {
      const int64_t end = min64(padded, begin + kFloatChunk);
      memset(sums, 0, bytes);
      for (int64_t k = begin; k < end; k += piece)
        for (int s = 0; s < b.streams; ++s) {
          const Piece p = piece_at(b, s, g, k, min64(piece, end - k));
          const float* x = job.x + b.m * job.x_stride + g * w.group_padded + k;
          float* of_stream = sums + 2 * s * b.rows * kHalf;
          if (b.rows == 1) {
            if (p.halves == 2)
              add_direct<Format, 2>(format, p, x, of_stream);
            else
              add_direct<Format, 1>(format, p, x, of_stream);
            continue;
          }
          unpack(format, p, values);
          for (int half = 0; half < p.halves; ++half)
            add_rows(values + half * kHalfFloats, p.columns, x, job.x_stride, b.rows,
                     of_stream + half * b.rows * kHalf);
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

// Codes minus the symmetric zero (or nothing): the code goes into the mantissa of a power of two
// at the place where its byte lies, and a subtraction, exact, takes the power off. No shift for
// three of four columns, and no conversion.
template <int kCodeBits>
struct FloatInt {
  static constexpr int kBits = kCodeBits;
  __m256 low, middle, high;  // powers of two plus the zero

  explicit FloatInt(const Packed& w) {
    const float zero = (float)code_offset(w);
    low = _mm256_set1_ps(0x1p23f + zero);
    middle = _mm256_set1_ps(0x1p15f + zero);
    high = _mm256_set1_ps(0x1p7f + zero);
  }

  void enter(const Piece&) {}

  template <int kExponent>
  static __m256 minus(__m256i bits, __m256 power) {
    const __m256i exponent = _mm256_set1_epi32((127 + kExponent) << 23);
    return _mm256_sub_ps(_mm256_castsi256_ps(_mm256_or_si256(bits, exponent)), power);
  }

  __m256 value(__m256i codes, int j) const {
    if (j == 3) return minus<23>(_mm256_srli_epi32(codes, 24), low);
    // Bit 23 does not fit a mantissa: a code of 8 bits moves down a byte.
    const bool down = kBits == 8 && j == 2;
    if (down) codes = _mm256_srli_epi32(codes, 8);
    const int byte = down ? 1 : j;
    const __m256i bits = _mm256_and_si256(codes, _mm256_set1_epi32(0xff << (8 * byte)));
    return byte == 0   ? minus<23>(bits, low)
           : byte == 1 ? minus<15>(bits, middle)
                       : minus<7>(bits, high);
  }

  void values(int, __m256i codes, __m256 v[4]) const {
    repeat<4>([&](int j) { v[j] = value(codes, j); });
  }

  template <int kCount>
  void add_columns(const __m256i* codes, const float* x, __m256* acc) const {
    repeat<4>([&](int j) {
      const __m256 one = _mm256_broadcast_ss(x + j);
      repeat<kCount>([&](int i) { acc[i] = _mm256_fmadd_ps(one, value(codes[i], j), acc[i]); });
    });
  }
};

// Bytes of codes in a table of 8 entries, which vpermps indexes with the lowest three bits.
inline void look_up_eight(__m256 table, __m256i codes, __m256 v[4]) {
  v[0] = _mm256_permutevar8x32_ps(table, codes);
  v[1] = _mm256_permutevar8x32_ps(table, _mm256_srli_epi32(codes, 8));
  v[2] = _mm256_permutevar8x32_ps(table, _mm256_srli_epi32(codes, 16));
  v[3] = _mm256_permutevar8x32_ps(table, _mm256_srli_epi32(codes, 24));
}

// One table for the whole tensor: of 16 entries, looked up byte by byte; of 8, which vpermps does.
template <int kCodeBits>
struct FloatTable {
  static constexpr int kBits = kCodeBits;
  BytePlanes planes;
  __m256 eight;

  explicit FloatTable(const Packed& w)
      : planes(static_cast<const float*>(w.table), static_cast<const float*>(w.table)),
        eight(_mm256_loadu_ps(static_cast<const float*>(w.table))) {}

  void enter(const Piece&) {}

  void values(int, __m256i codes, __m256 v[4]) const {
    if constexpr (kBits == 4)
      planes.look_up(transpose_bytes(codes), v);
    else
      look_up_eight(eight, codes, v);
  }

  // A lookup makes four columns at once: register by register.
  template <int kCount>
  void add_columns(const __m256i* codes, const float* x, __m256* acc) const {
    __m256 one[4];
    repeat<4>([&](int j) { one[j] = _mm256_broadcast_ss(x + j); });
    repeat<kCount>([&](int i) {
      __m256 v[4];
      values(i, codes[i], v);
      repeat<4>([&](int j) { acc[i] = _mm256_fmadd_ps(one[j], v[j], acc[i]); });
    });
  }
};

// Tables per tile: a register of eight outputs has one of 8 entries.
struct FloatTileTable {
  static constexpr int kBits = 3;
  __m256 tables[4];  // of the registers of a panel

  explicit FloatTileTable(const Packed&) {}

  void enter(const Piece& p) {
    for (int i = 0; i < 2 * p.halves; ++i) tables[i] = _mm256_cvtph_ps(load128(p.tables + 16 * i));
  }

  void values(int i, __m256i codes, __m256 v[4]) const { look_up_eight(tables[i], codes, v); }

  template <int kCount>
  void add_columns(const __m256i* codes, const float* x, __m256* acc) const {
    repeat<4>([&](int j) {
      const __m256 one = _mm256_broadcast_ss(x + j);
      repeat<kCount>([&](int i) {
        const __m256i code = j ? _mm256_srli_epi32(codes[i], 8 * j) : codes[i];
        acc[i] = _mm256_fmadd_ps(one, _mm256_permutevar8x32_ps(tables[i], code), acc[i]);
      });
    });
  }
};

}  // namespace
}  // namespace qkern
