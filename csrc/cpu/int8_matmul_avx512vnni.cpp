// SPDX-License-Identifier: Apache-2.0
// c = a . b of int8, exact int32 sums: vpdpbusd over b + 128, both operands dense along k.
//
// b + 128 is unsigned; -128 times the row's sum, taken once, makes it good. Sums wrap mod 2^32 on
// the way, the result fits.
//
//   up to kFewRows rows: a tile is up to 6 rows x 4 columns, 24 sums of 16 lanes each, 10 loads for
//     24 vpdpbusd. b is read once as it lies, in four streams that are a quarter of it apart (Xeon
//     with AMX, 4096 x 4096, M = 1 / 4 / 8 of neighbouring columns 1.40 / 1.60 / 2.05 ms, with
//     prefetches 1.31 / 1.38 / 1.66, a quarter apart 1.19 / 1.23 / 1.48). At the end the lanes of
//     four sums are added by transposition, 13 instructions for four outputs.
//   more rows: a piece of 32 columns is turned to dword lanes once, 64 shuffles per KiB, and all
//     rows pass it in the tiles of the linear kernels (simd/a8_tile_avx512.h). Tried and lost: the
//     tiles above, which read ten lines from the second level of cache per 24 vpdpbusd (twice the
//     time at 256 rows of 4096).
//
// One core of a Zen 4 server, 4096 x 4096, b a transposed weight: M = 1 / 4 / 16 / 64 / 256 in
// 0.65 / 1.0 / 2.6 / 6.6 / 23 ms (torch._int_mm 1.1 / 6.7 / 7.5 / 11 / 27 ms in the same passes);
// of the 256 rows, 378 GOPS. b dense along n costs 8 ms more, the turning of its blocks.

#include <immintrin.h>

#include "kernels.h"
#include "simd/a8_tile_avx512.h"
#include "simd/fold_avx512.h"
#include "simd/rows_avx512.h"

namespace qkern {
namespace {

constexpr int kRows = 6, kColumns = 4;
constexpr int64_t kFewRows = 8;
constexpr int64_t kAhead = 3072;             // bytes from a load of b to its prefetch
constexpr int64_t kPiece = 512;              // columns of k that are turned at a time: 16 KiB
constexpr int64_t kWide = kVectors * kHalf;  // columns of b

// Rows m .. m + R - 1 times `count` columns from n on, `apart` from one to the next; corrections[r]
// is -128 times a row's sum.
template <int R>
void tile(const MatmulJob& job, int64_t m, int64_t n, int64_t count, int64_t apart,
          const int32_t* corrections) {
  const int8_t* a[R];
  const int8_t* b[kColumns];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) a[r] = job.a + (m + r) * job.a_stride;
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c)
    b[c] = job.b + (n + (c < count ? c * apart : 0)) * job.b_stride;
  __m512i sums[R][kColumns];
#pragma GCC unroll 24
  for (int i = 0; i < R * kColumns; ++i) sums[i / kColumns][i % kColumns] = _mm512_setzero_si512();
  const __m512i sign = _mm512_set1_epi8((char)0x80);
  const auto step = [&](const auto& load) {
    __m512i u8[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) u8[c] = _mm512_xor_si512(load(b[c]), sign);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512i s8 = load(a[r]);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sums[r][c] = dot<255>(sums[r][c], u8[c], s8);
    }
  };
  int64_t k = 0;
  for (; k + 64 <= job.k; k += 64) {
    // Behind a column of b comes the next one.
    const int64_t left = job.k - k - kAhead, ahead = left > 0 ? k + kAhead : job.b_stride - left;
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) _mm_prefetch((const char*)b[c] + ahead, _MM_HINT_T0);
    step([k](const int8_t* p) { return _mm512_loadu_si512(p + k); });
  }
  if (k < job.k) {
    // Columns beyond are 0 in a, and b + 128 = 128 times 0 there.
    const __mmask64 left = first_bytes(job.k - k);
    step([=](const int8_t* p) { return _mm512_maskz_loadu_epi8(left, p + k); });
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    alignas(16) int32_t four[kColumns];
    _mm_store_si128((__m128i*)four,
                    _mm_add_epi32(fold_dwords(sums[r]), _mm_set1_epi32(corrections[r])));
    int32_t* c = job.c + (m + r) * job.c_stride + n;
    for (int64_t i = 0; i < count; ++i) c[i * apart] = four[i];
  }
}

// -128 times the sum of a row.
int32_t correction(const int8_t* a, int64_t k) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) sum = dot<1>(sum, ones, _mm512_loadu_si512(a + i));
  if (i < k) sum = dot<1>(sum, ones, _mm512_maskz_loadu_epi8(first_bytes(k - i), a + i));
  return (int32_t)(0u - 128u * (uint32_t)_mm512_reduce_add_epi32(sum));
}

// Columns n .. n + 15 of b, of which `count` exist, rows k .. k + length - 1, plus 128, to vectors
// of four rows of sixteen columns, 64 * kVectors bytes apart.
void turn(const MatmulJob& job, int64_t n, int64_t count, int64_t k, int64_t length, uint8_t* to) {
  const __m512i sign = _mm512_set1_epi8((char)0x80);
  for (int64_t done = 0; done < length; done += 64, to += 16 * 64 * kVectors) {
    const __mmask64 mask = first_bytes(length - done);
    __m512i v[kHalf];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      const int8_t* from = job.b + (n + (i < count ? i : 0)) * job.b_stride;
      v[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, from + k + done), sign);
    }
    transpose_16x16(v);
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) _mm512_store_si512(to + i * 64 * kVectors, v[i]);
  }
}

// A turned piece for R rows from m on.
template <int R>
void pass(const MatmulJob& job, TileInput in, int64_t m, int64_t n, int64_t k,
          const __mmask16 (&columns)[kVectors], const int32_t* corrections) {
  __m512i sums[R][kVectors];
  in.x = job.a + m * job.a_stride + k;
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = k == 0 ? _mm512_set1_epi32(corrections[r])
                          : _mm512_maskz_loadu_epi32(
                                columns[v], job.c + (m + r) * job.c_stride + n + kHalf * v);
  sum_tile<255, 1>(in, sums);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      _mm512_mask_storeu_epi32(job.c + (m + r) * job.c_stride + n + kHalf * v, columns[v],
                               sums[r][v]);
}

// Rows m0 .. m0 + rows - 1, at most kBlock, times columns n .. n + count - 1, at most kWide.
void multiply_many(const MatmulJob& job, int64_t m0, int64_t rows, int64_t n, int64_t count,
                   const int32_t* corrections) {
  using Pass = void (*)(const MatmulJob&, TileInput, int64_t, int64_t, int64_t,
                        const __mmask16(&)[kVectors], const int32_t*);
  static constexpr Pass kPasses[kRows] = {pass<1>, pass<2>, pass<3>, pass<4>, pass<5>, pass<6>};
  alignas(64) uint8_t turned[kPiece * kWide];
  __mmask16 columns[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = count - kHalf * v;
    columns[v] = left >= kHalf ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
  }
  const int64_t tiles = ceil_div(rows, kRows);
  for (int64_t k = 0; k < job.k; k += kPiece) {
    const int64_t length = min64(kPiece, job.k - k);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = columns[v] ? kHalf * v : 0;
      turn(job, n + first, min64(kHalf, count - first), k, length, turned + 64 * v);
    }
    TileInput in = {};
    in.x_stride = job.a_stride;
    in.weights = turned;
    in.stride = 64 * kVectors;
    in.steps = ceil_div(length, 4);
    in.ahead[0] = reinterpret_cast<const char*>(turned);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = rows * i / tiles;
      kPasses[rows * (i + 1) / tiles - row - 1](job, in, m0 + row, n, k, columns,
                                                corrections + row);
    }
  }
}

constexpr int64_t kBlock = 1024;  // rows whose sums are taken at a time

}  // namespace

void int8_matmul_avx512vnni(const MatmulJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  using Tile = void (*)(const MatmulJob&, int64_t, int64_t, int64_t, int64_t, const int32_t*);
  static constexpr Tile kTiles[kRows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
  const bool many = m1 - m0 > kFewRows && job.a_padded && job.k > 0;
  for (int64_t begin = m0; begin < m1; begin += kBlock) {
    const int64_t rows = min64(kBlock, m1 - begin), tiles = ceil_div(rows, kRows);
    int32_t corrections[kBlock];
    for (int64_t r = 0; r < rows; ++r)
      corrections[r] = correction(job.a + (begin + r) * job.a_stride, job.k);
    if (many) {
      for (int64_t n = n0; n < n1; n += kWide)
        multiply_many(job, begin, rows, n, min64(kWide, n1 - n), corrections);
      continue;
    }
    const auto all_rows = [&](int64_t n, int64_t count, int64_t apart) {
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t row = rows * i / tiles;
        kTiles[rows * (i + 1) / tiles - row - 1](job, begin + row, n, count, apart,
                                                 corrections + row);
      }
    };
    const int64_t quarter = (n1 - n0) / kColumns, left = (n1 - n0) % kColumns;
    for (int64_t n = n0; n < n0 + quarter; ++n) all_rows(n, kColumns, quarter);
    if (left) all_rows(n1 - left, left, 1);
  }
}

}  // namespace qkern
