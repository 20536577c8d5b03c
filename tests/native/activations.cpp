// SPDX-License-Identifier: Apache-2.0
#include "activations.h"

#include <algorithm>

namespace sweep {

void Matrix::place(qk_dtype dtype, int64_t m, int64_t k, Lay lay, Random& random) {
  const int64_t pad = random.below(70), apart = random.between(2, 3);
  dtype_ = dtype;
  column_stride_ = 1;
  row_stride_ = k;
  switch (lay) {
    case Lay::kPadded:
      row_stride_ = k + pad;
      break;
    case Lay::kRowsReversed:
      row_stride_ = -(k + pad);
      break;
    case Lay::kColumnsApart:
      column_stride_ = apart;
      row_stride_ = apart * k + pad;
      break;
    case Lay::kColumnsReversed:
      column_stride_ = -1;
      break;
    case Lay::kTransposed:
      column_stride_ = m + pad % 3;
      row_stride_ = 1;
      break;
    case Lay::kSameRow:
      row_stride_ = 0;
      break;
    case Lay::kAllReversed:
      column_stride_ = -apart;
      row_stride_ = -(apart * k + pad);
      break;
    case Lay::kSameColumn:
      column_stride_ = 0;
      row_stride_ = 1 + pad;
      break;
    default:
      break;
  }
  const int64_t rows = (m - 1) * row_stride_, columns = (k - 1) * column_stride_;
  const int64_t first = std::min<int64_t>(0, rows) + std::min<int64_t>(0, columns);
  const int64_t last = std::max<int64_t>(0, rows) + std::max<int64_t>(0, columns);
  const int64_t bytes = (last - first + 1) * size_of(dtype);
  // Any byte offset, also one that is no multiple of the element.
  const int64_t offset = random.one_in(2) ? 0 : random.below(64);
  uint8_t* data = random.one_in(2) ? memory_.place(bytes, Flush::kEnd, 1, 0, 0xff)
                                   : memory_.place(bytes, Flush::kBegin, 1, offset, 0xff);
  base_ = data - first * size_of(dtype);
}

float quantize_group(const std::vector<double>& values, int8_t* codes) {
  float largest = 0;
  bool finite = true;
  for (double v : values) {
    finite = finite && std::isfinite(v);
    largest = std::fmax(largest, std::fabs((float)v));
  }
  const bool usable = finite && largest >= std::ldexp(1.f, -100);
  std::fill(codes, codes + values.size(), (int8_t)0);
  if (!usable) return finite ? 0.f : NAN;
  const float factor = 127.f / largest;
  for (size_t i = 0; i < values.size(); ++i) {
    const float scaled = (float)values[i] * factor;
    codes[i] = (int8_t)std::nearbyint(scaled);
  }
  return largest / 127.f;
}

}  // namespace sweep
