// SPDX-License-Identifier: Apache-2.0
// c = a . b of int8, exact int32 sums: both operands as int16, vpmaddwd, vpaddd; dense along k.
// (vpmaddubsw would saturate: 2 * 128 * 128 does not fit int16.)
//
// k goes in pieces of kPiece columns, of which four columns of b are widened once for all rows; a
// tile is 6 rows x 4 columns of b, whose lanes are added at the end of a piece. Up to kFewRows rows
// b is widened where it is used.

// One core of a Zen 4 server, 4096 x 4096, b a transposed weight: M = 1 / 4 / 16 / 64 in 1.0 / 1.6
// / 5.5 / 17 ms.

#include <immintrin.h>

#include "kernels.h"

namespace qkern {
namespace {

constexpr int kRows = 6, kColumns = 4;
constexpr int kStep = 32;         // columns of a register of int16
constexpr int64_t kPiece = 1024;  // int16 of four columns of b: 8 KiB
constexpr int64_t kFewRows = 6;

inline __m512i widen(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// A column of b in the making: bytes as they lie, or widened before.
struct Bytes {
  const int8_t* p;
  __m512i load(int64_t k) const { return widen(p + k); }
};
struct Words {
  const int16_t* p;
  __m512i load(int64_t k) const { return _mm512_load_si512(p + k); }
};

// Lane sums of four registers.
inline __m128i fold(const __m512i (&s)[kColumns]) {
  const __m512i s01 =
      _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
  const __m512i s23 =
      _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(s01, s23), _mm512_unpackhi_epi64(s01, s23));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// `length` columns of R rows of a times four columns of b, a multiple of kStep; added to c unless
// these are the first. Only `count` columns exist.
template <class Column, int R>
void tile(const int8_t* a, int64_t a_stride, const Column (&b)[kColumns], int64_t length,
          bool first, int32_t* c, int64_t c_stride, int64_t count) {
  __m512i sums[R][kColumns];
#pragma GCC unroll 24
  for (int i = 0; i < R * kColumns; ++i) sums[i / kColumns][i % kColumns] = _mm512_setzero_si512();
  for (int64_t k = 0; k < length; k += kStep) {
    __m512i b_c[kColumns];
#pragma GCC unroll 4
    for (int i = 0; i < kColumns; ++i) b_c[i] = b[i].load(k);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512i a_r = widen(a + r * a_stride + k);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c)
        sums[r][c] = _mm512_add_epi32(sums[r][c], _mm512_madd_epi16(a_r, b_c[c]));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    alignas(16) int32_t four[kColumns];
    _mm_store_si128(reinterpret_cast<__m128i*>(four), fold(sums[r]));
    for (int64_t i = 0; i < count; ++i)
      c[r * c_stride + i] = (first ? 0 : c[r * c_stride + i]) + four[i];
  }
}

// Rows [m0, m1) in tiles of nearly equal height.
template <class Column>
void add_rows(const MatmulJob& job, const int8_t* a, int64_t a_stride, int64_t rows,
              const Column (&b)[kColumns], int64_t length, bool first, int32_t* c, int64_t count) {
  static constexpr decltype(&tile<Column, 1>) kTiles[kRows] = {tile<Column, 1>, tile<Column, 2>,
                                                               tile<Column, 3>, tile<Column, 4>,
                                                               tile<Column, 5>, tile<Column, 6>};
  const int64_t tiles = ceil_div(rows, kRows);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t row = rows * i / tiles;
    kTiles[rows * (i + 1) / tiles - row - 1](a + row * a_stride, a_stride, b, length, first,
                                             c + row * job.c_stride, job.c_stride, count);
  }
}

void widen_column(const int8_t* from, int64_t length, int16_t* to) {
  for (int64_t k = 0; k < length; k += kStep) _mm512_store_si512(to + k, widen(from + k));
}

// The last columns, fewer than kStep, of one operand with zeros behind them.
void pad(const int8_t* from, int64_t left, int8_t* to) {
  memset(to, 0, kStep);
  memcpy(to, from, (size_t)left);
}

// All rows times columns n .. n + count - 1.
void multiply_columns(const MatmulJob& job, int64_t m0, int64_t m1, int64_t n, int64_t count) {
  const int64_t rows = m1 - m0, whole = job.k / kStep * kStep, left = job.k - whole;
  const int8_t* a = job.a + m0 * job.a_stride;
  int32_t* c = job.c + m0 * job.c_stride + n;
  const auto column = [&](int i) { return job.b + (n + (i < count ? i : 0)) * job.b_stride; };
  if (rows <= kFewRows) {
    const Bytes b[kColumns] = {{column(0)}, {column(1)}, {column(2)}, {column(3)}};
    add_rows(job, a, job.a_stride, rows, b, whole, true, c, count);
  } else {
    alignas(64) int16_t wide[kColumns][kPiece];
    const Words b[kColumns] = {{wide[0]}, {wide[1]}, {wide[2]}, {wide[3]}};
    for (int64_t k = 0; k == 0 || k < whole; k += kPiece) {
      const int64_t length = min64(kPiece, whole - k);
      for (int i = 0; i < kColumns; ++i) widen_column(column(i) + k, length, wide[i]);
      add_rows(job, a + k, job.a_stride, rows, b, length, k == 0, c, count);
    }
  }
  if (left == 0) return;
  int8_t padded[kColumns][kStep];
  for (int i = 0; i < kColumns; ++i) pad(column(i) + whole, left, padded[i]);
  const Bytes b[kColumns] = {{padded[0]}, {padded[1]}, {padded[2]}, {padded[3]}};
  for (int64_t r = 0; r < rows; ++r) {
    int8_t row[kStep];
    pad(a + r * job.a_stride + whole, left, row);
    tile<Bytes, 1>(row, 0, b, kStep, false, c + r * job.c_stride, 0, count);
  }
}

}  // namespace

void int8_matmul_avx512(const MatmulJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  constexpr int64_t kBlock = 96;  // rows that pass while columns of b stay in the cache
  for (int64_t m = m0; m < m1; m += kBlock)
    for (int64_t n = n0; n < n1; n += kColumns)
      multiply_columns(job, m, min64(m1, m + kBlock), n, min64(kColumns, n1 - n));
}

}  // namespace qkern
