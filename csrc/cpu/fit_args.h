// SPDX-License-Identifier: Apache-2.0
// Checks that the functions on codes and the fitting functions share. Each returns QK_OK or stores
// a sentence that begins with the name of the call.
#pragma once

#include <atomic>

#include "error.h"
#include "numeric.h"
#include "parallel.h"
#include "structs.h"

namespace qkern {

// Addresses of any accepted matrix stay below 2^63 bytes (elements have at most 8).
constexpr int64_t kMostElements = INT64_C(1) << 59;

inline qk_status check_bits(const char* call, int32_t bits, int32_t least) {
  if (bits < least || bits > 8)
    return fail(QK_INVALID_ARGUMENT, "%s: expected %d to 8 bits, got %d", call, least, bits);
  return QK_OK;
}

// A matrix of `rows` rows that are `width` long and `stride` apart. The stride of a single row is
// never used and may be anything, as numpy and torch leave it.
inline qk_status check_rows(const char* call, const char* what, const void* data, int64_t rows,
                            int64_t width, int64_t stride) {
  if (rows < 0 || width < 0)
    return fail(QK_INVALID_ARGUMENT, "%s: sizes must not be negative, got %lld x %lld for %s", call,
                (long long)rows, (long long)width, what);
  if (rows > 1 && stride < width)
    return fail(QK_INVALID_ARGUMENT, "%s: the rows of %s are %lld long but only %lld apart", call,
                what, (long long)width, (long long)stride);
  if (width > kMostElements || (rows > 1 && stride > kMostElements / rows))
    return fail(QK_INVALID_ARGUMENT, "%s: %s with %lld rows of stride %lld does not fit in memory",
                call, what, (long long)rows, (long long)stride);
  if (!data && rows > 0 && width > 0)
    return fail(QK_INVALID_ARGUMENT, "%s: %s is NULL", call, what);
  return QK_OK;
}

// Columns per group; 0 stands for the whole row.
inline qk_status check_group(const char* call, int64_t k, int64_t* group) {
  if (*group == 0) *group = k;
  if (k > 0 && (*group < 1 || *group > k))
    return fail(QK_INVALID_ARGUMENT,
                "%s: expected a group of 1 to %lld columns (or 0: the whole row), got %lld", call,
                (long long)k, (long long)*group);
  return QK_OK;
}

inline qk_status check_table_per(const char* call, qk_table_per per) {
  if (per < QK_TABLE_PER_TENSOR || per > QK_TABLE_PER_GROUP)
    return fail(QK_INVALID_ARGUMENT,
                "%s: table_per must be 0 (tensor), 1 (row) or 2 (group), got %d", call, per);
  return QK_OK;
}

// The lowest row for which is_bad(row) holds, or `rows`.
template <class IsBad>
int64_t first_bad_row(const qk_parallel* parallel, int64_t rows, const IsBad& is_bad) {
  std::atomic<int64_t> first{rows};
  parallel_for(parallel, rows, [&](int64_t row) {
    int64_t lowest = first.load(std::memory_order_relaxed);
    if (row > lowest || !is_bad(row)) return;
    while (row < lowest && !first.compare_exchange_weak(lowest, row)) {
    }
  });
  return first.load();
}

inline bool is_finite_bits(uint32_t bits) { return bits << 1 < 0xff000000u; }
// Finite and not below 0 (-0 is 0).
inline bool is_weight_bits(uint32_t bits) { return bits < 0x7f800000u || bits == 0x80000000u; }

// QK_BAD_FORMAT with row and column of the first number that is not finite, or, where `signed_too`
// is false, is negative.
inline qk_status check_numbers(const char* call, const char* what, const qk_parallel* parallel,
                               const float* data, int64_t rows, int64_t width, int64_t stride,
                               bool signed_too) {
  const auto good = [signed_too](float f) {
    return signed_too ? is_finite_bits(float_bits(f)) : is_weight_bits(float_bits(f));
  };
  const int64_t row = first_bad_row(parallel, rows, [&](int64_t r) {
    const float* numbers = data + r * stride;
    bool bad = false;
    if (signed_too)
      for (int64_t c = 0; c < width; ++c) bad |= !is_finite_bits(float_bits(numbers[c]));
    else
      for (int64_t c = 0; c < width; ++c) bad |= !is_weight_bits(float_bits(numbers[c]));
    return bad;
  });
  if (row == rows) return QK_OK;
  int64_t column = 0;
  while (good(data[row * stride + column])) ++column;
  return fail(QK_BAD_FORMAT, "%s: expected %s numbers in %s, got %g in row %lld, column %lld", call,
              signed_too ? "finite" : "finite, non-negative", what,
              (double)data[row * stride + column], (long long)row, (long long)column);
}

}  // namespace qkern
