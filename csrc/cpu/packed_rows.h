// SPDX-License-Identifier: Apache-2.0
// Rows of the packed layout as floats, for qk_dequantize.
#pragma once

#include "kernels.h"

namespace qkern {

// Several rows of one half of a packed weight. The values are those of `dequantize` from canonical
// storage: it is given the codes as bytes, and the group's numbers as they are stored.
class PackedDecoder {
 public:
  // Memory for one thread.
  static int64_t scratch_bytes();

  PackedDecoder(const Packed& w, DequantizeKernel dequantize, UnpackKernel unpack, qk_dtype dtype,
                bool past_caches, uint8_t* scratch);
  // Rows n .. n + count - 1, all of one half; row i goes to out + i * stride_bytes, input order.
  void rows(int64_t n, int count, uint8_t* out, int64_t stride_bytes);

 private:
  struct Span;
  void read_codes(const Span& span);
  void read_numbers(const Span& span);
  void write(const Span& span, uint8_t* out, int64_t stride_bytes);

  const Packed& w_;
  DequantizeKernel dequantize_;
  UnpackKernel unpack_;
  qk_dtype dtype_;
  bool past_caches_;  // as in DequantizeRow
  struct Scratch;
  Scratch& s_;
};

// out[to[i]] = values[i] for elements of a dtype.
void scatter(const void* values, qk_dtype dtype, int64_t count, const int32_t* to, void* out);

}  // namespace qkern
