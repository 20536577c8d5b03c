// SPDX-License-Identifier: Apache-2.0
// Activations of a call: values, where they lie, and the quantization of the int8 modes written
// from its description in qkern.h.
#pragma once

#include <vector>

#include "guarded.h"
#include "numbers.h"

namespace sweep {

enum class Lay {
  kDense,
  kPadded,
  kRowsReversed,
  kColumnsApart,
  kColumnsReversed,
  kTransposed,
  kSameRow,
  kAllReversed,
  kSameColumn,
  kCount
};

// A matrix of values in guarded memory. What lies between its elements is NaN.
class Matrix {
 public:
  void place(qk_dtype dtype, int64_t m, int64_t k, Lay lay, Random& random);
  void set(int64_t m, int64_t k, double value) { encode(dtype_, base_, at(m, k), value); }
  double get(int64_t m, int64_t k) const { return decode(dtype_, base_, at(m, k)); }
  const void* row(int64_t m) const { return base_ + at(m, 0) * size_of(dtype_); }
  const void* base() const { return base_; }
  qk_dtype dtype() const { return dtype_; }
  int64_t row_stride() const { return row_stride_; }
  int64_t column_stride() const { return column_stride_; }
  Guarded& memory() { return memory_; }

 private:
  int64_t at(int64_t m, int64_t k) const { return m * row_stride_ + k * column_stride_; }

  Guarded memory_;
  qk_dtype dtype_ = QK_F32;
  uint8_t* base_ = nullptr;
  int64_t row_stride_ = 0, column_stride_ = 0;
};

// One group of values as qkern.h says: the scale, and the codes into `codes`.
float quantize_group(const std::vector<double>& values, int8_t* codes);

}  // namespace sweep
