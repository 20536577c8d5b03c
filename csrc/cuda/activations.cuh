// SPDX-License-Identifier: Apache-2.0
// Activations as they come, and where the columns that a kernel reads lie in them; the rule of
// dynamic int8. Pure functions for host and device.
#pragma once

#include "experts.cuh"

namespace qkern {
namespace cuda {

// What one group's largest magnitude (bits of a float; NaN and infinity are larger than any other)
// means: scale for the results, factor for the values.
struct QuantizeScale {
  float scale, factor;
};
QK_HD QuantizeScale quantize_scale(uint32_t largest_bits) {
  const float largest = bits_as_float(largest_bits);
  if (largest_bits >= 0x7f800000u) return {bits_as_float(0x7fc00000u), 0.f};
  if (largest < 0x1p-100f) return {0.f, 0.f};
  return {div_rn(largest, 127.f), div_rn(127.f, largest)};
}
QK_HD int8_t quantized(float x, QuantizeScale s) {
  return s.factor == 0.f ? (int8_t)0 : (int8_t)(int)rintf(mul_rn(x, s.factor));
}

struct Activations {
  const void* data;
  qk_dtype dtype;
  int64_t m, k, row_stride, col_stride;
};

// Where columns of the destination come from: layout.column_of, then perm. NULL layout: as they
// are.
struct Gather {
  bool padded;  // else columns 0..k-1 in order
  Layout layout;
  const int32_t* first_perm;
  const int64_t* offsets;  // of experts, each with a perm; NULL: one for all rows
  int64_t experts, expert_bytes;

  // Columns of a row of the batch: NULL where they are in order.
  QK_HD const int32_t* perm(int64_t row) const {
    if (!first_perm || !offsets) return first_perm;
    return (const int32_t*)((const uint8_t*)first_perm +
                            expert_of(offsets, experts, row) * expert_bytes);
  }
  // Column of the input; -1 for padding, -2 where perm is out of range.
  QK_HD int64_t source(int64_t column, const int32_t* perm) const {
    if (!padded) return column;
    const int64_t from = layout.column_of(column);
    if (from < 0 || !perm) return from;
    const int64_t to = perm[from];
    return to >= 0 && to < layout.k ? to : -2;
  }
};

// Rows of `k` numbers as they are, padded to `columns`.
inline Gather padded_rows(int64_t k, int64_t columns) {
  Gather gather = {};
  gather.padded = true;
  gather.layout.k = k;
  gather.layout.groups = 1;
  gather.layout.k_padded = columns;
  return gather;
}

// Columns of the destination from one group to the next.
inline int64_t group_out(int64_t group, const Gather& gather, int64_t columns, int64_t k) {
  if (group >= k) return columns;
  return gather.padded && gather.layout.groups > 1 ? gather.layout.group_padded : group;
}

}  // namespace cuda
}  // namespace qkern
