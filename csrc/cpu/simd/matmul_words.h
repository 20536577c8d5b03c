// SPDX-License-Identifier: Apache-2.0
// int8_matmul over int16 products: the walk over rows, columns and pieces of k. What an instruction
// set brings is `Isa`:
//   Register, kStep    a register of int16 holds kStep columns
//   kRows, kFewRows    rows of a tile; up to kFewRows rows b is widened where it is used
//   zero(), widen(p)   kStep bytes as int16
//   load(p), store(p, v)
//   add_products(sum, a, b)   pairs of products added to the dwords of sum
//   fold(sums)         the lane sums of four registers
#pragma once

#include <string.h>

#include "../kernels.h"

namespace qkern {
namespace {

constexpr int kColumns = 4;       // of b in a tile
constexpr int64_t kPiece = 1024;  // int16 of four columns of b: 8 KiB

// A column of b: bytes as they lie, or widened before.
template <class Isa>
struct Bytes {
  const int8_t* p;
  auto load(int64_t k) const { return Isa::widen(p + k); }
};
template <class Isa>
struct Words {
  const int16_t* p;
  auto load(int64_t k) const { return Isa::load(p + k); }
};

// `length` columns of R rows of a times four columns of b, a multiple of kStep; added to c unless
// these are the first. Only `count` columns exist.
template <class Isa, class Column, int R>
void tile(const int8_t* a, int64_t a_stride, const Column (&b)[kColumns], int64_t length,
          bool first, int32_t* c, int64_t c_stride, int64_t count) {
  typename Isa::Register sums[R][kColumns];
#pragma GCC unroll 24
  for (int i = 0; i < R * kColumns; ++i) sums[i / kColumns][i % kColumns] = Isa::zero();
  for (int64_t k = 0; k < length; k += Isa::kStep) {
    decltype(b[0].load(k)) b_c[kColumns];
#pragma GCC unroll 4
    for (int i = 0; i < kColumns; ++i) b_c[i] = b[i].load(k);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const auto a_r = Isa::widen(a + r * a_stride + k);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sums[r][c] = Isa::add_products(sums[r][c], a_r, b_c[c]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    alignas(16) int32_t four[kColumns];
    _mm_store_si128(reinterpret_cast<__m128i*>(four), Isa::fold(sums[r]));
    for (int64_t i = 0; i < count; ++i)
      c[r * c_stride + i] = (first ? 0 : c[r * c_stride + i]) + four[i];
  }
}

// The tile of `rows` rows, 1 to R.
template <class Isa, class Column, int R = Isa::kRows>
void tile_of(int64_t rows, const int8_t* a, int64_t a_stride, const Column (&b)[kColumns],
             int64_t length, bool first, int32_t* c, int64_t c_stride, int64_t count) {
  if constexpr (R > 1) {
    if (rows < R)
      return tile_of<Isa, Column, R - 1>(rows, a, a_stride, b, length, first, c, c_stride, count);
  }
  tile<Isa, Column, R>(a, a_stride, b, length, first, c, c_stride, count);
}

// All rows in tiles of nearly equal height.
template <class Isa, class Column>
void add_rows(const MatmulJob& job, const int8_t* a, int64_t rows, const Column (&b)[kColumns],
              int64_t length, bool first, int32_t* c, int64_t count) {
  const int64_t tiles = ceil_div(rows, Isa::kRows);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t row = rows * i / tiles;
    tile_of<Isa, Column>(rows * (i + 1) / tiles - row, a + row * job.a_stride, job.a_stride, b,
                         length, first, c + row * job.c_stride, job.c_stride, count);
  }
}

template <class Isa>
void widen_column(const int8_t* from, int64_t length, int16_t* to) {
  for (int64_t k = 0; k < length; k += Isa::kStep) Isa::store(to + k, Isa::widen(from + k));
}

// The last columns, fewer than kStep, of one operand with zeros behind them.
template <class Isa>
void pad(const int8_t* from, int64_t left, int8_t* to) {
  memset(to, 0, Isa::kStep);
  memcpy(to, from, (size_t)left);
}

// Rows [m0, m1) times columns n .. n + count - 1.
template <class Isa>
void multiply_columns(const MatmulJob& job, int64_t m0, int64_t m1, int64_t n, int64_t count) {
  constexpr int64_t kStep = Isa::kStep;
  const int64_t rows = m1 - m0, whole = job.k / kStep * kStep, left = job.k - whole;
  const int8_t* a = job.a + m0 * job.a_stride;
  int32_t* c = job.c + m0 * job.c_stride + n;
  const auto column = [&](int i) { return job.b + (n + (i < count ? i : 0)) * job.b_stride; };
  if (rows <= Isa::kFewRows) {
    const Bytes<Isa> b[kColumns] = {{column(0)}, {column(1)}, {column(2)}, {column(3)}};
    add_rows<Isa>(job, a, rows, b, whole, true, c, count);
  } else {
    alignas(64) int16_t wide[kColumns][kPiece];
    const Words<Isa> b[kColumns] = {{wide[0]}, {wide[1]}, {wide[2]}, {wide[3]}};
    for (int64_t k = 0; k == 0 || k < whole; k += kPiece) {
      const int64_t length = min64(kPiece, whole - k);
      for (int i = 0; i < kColumns; ++i) widen_column<Isa>(column(i) + k, length, wide[i]);
      add_rows<Isa>(job, a + k, rows, b, length, k == 0, c, count);
    }
  }
  if (left == 0) return;
  int8_t padded[kColumns][kStep];
  for (int i = 0; i < kColumns; ++i) pad<Isa>(column(i) + whole, left, padded[i]);
  const Bytes<Isa> b[kColumns] = {{padded[0]}, {padded[1]}, {padded[2]}, {padded[3]}};
  for (int64_t r = 0; r < rows; ++r) {
    int8_t row[kStep];
    pad<Isa>(a + r * job.a_stride + whole, left, row);
    tile<Isa, Bytes<Isa>, 1>(row, 0, b, kStep, false, c + r * job.c_stride, 0, count);
  }
}

template <class Isa>
void multiply_words(const MatmulJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  constexpr int64_t kBlock = 96;  // rows that pass while columns of b stay in the cache
  for (int64_t m = m0; m < m1; m += kBlock)
    for (int64_t n = n0; n < n1; n += kColumns)
      multiply_columns<Isa>(job, m, min64(m1, m + kBlock), n, min64(kColumns, n1 - n));
}

}  // namespace
}  // namespace qkern
