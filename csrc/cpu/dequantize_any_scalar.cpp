// SPDX-License-Identifier: Apache-2.0
// One row of canonical storage to floats, any format, without vector instructions.
//
// Numbers: Int: scale * (code - zero), two roundings; table: (scale * table_scale) * entry.

#include "kernels.h"

namespace qkern {

void dequantize_any_scalar(const DequantizeRow& row) {
  const unsigned mask = (1u << row.bits) - 1;
  for (int64_t g = 0; g * row.group < row.k; ++g) {
    const float scale = row.scales ? load_float(row.scales, row.scale_dtype, g) : 1.f;
    const float zero =
        row.zeros ? load_float(row.zeros, row.zero_dtype, g) : (float)(1 << (row.bits - 1));
    const float* table = row.table ? row.table + g * row.table_group_stride : nullptr;
    const float table_factor = scale * row.table_scale;
    const int64_t end = min64(row.k, (g + 1) * row.group);
    for (int64_t k = g * row.group; k < end; ++k) {
      const int64_t bit = k * row.stream_bits;
      unsigned word = row.codes[bit >> 3];
      if ((bit & 7) + row.bits > 8) word |= (unsigned)row.codes[(bit >> 3) + 1] << 8;
      const unsigned code = (word >> (bit & 7)) & mask;
      store_float(row.out, row.out_dtype, k,
                  table ? table_factor * table[code] : scale * ((float)code - zero));
    }
  }
}

}  // namespace qkern
