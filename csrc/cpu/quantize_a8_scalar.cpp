// SPDX-License-Identifier: Apache-2.0
// Dynamic quantization of one row of activations, without vector instructions: the reference.
//
// Numbers: m = max|x| of the group; scale = m / 127; q = rint(x * (127 / m)), half to even. m below
// 2^-100 counts as zero (127 / m would overflow further down); NaN or infinity anywhere in the
// group makes its scale NaN, which reaches every output of the row.

#include "kernels.h"

namespace qkern {

void quantize_a8_scalar(const void* x, qk_dtype dtype, int64_t k, int64_t group, int8_t* q,
                        int64_t q_group_stride, float* scales) {
  for (int64_t g = 0; g * group < k; ++g) {
    const int64_t begin = g * group, columns = min64(group, k - begin);
    float largest = 0.f;
    bool finite = true;
    for (int64_t i = 0; i < columns; ++i) {
      const float magnitude = fabsf(load_float(x, dtype, begin + i));
      finite = finite && magnitude < INFINITY;
      if (magnitude > largest) largest = magnitude;
    }
    const bool usable = finite && largest >= 0x1p-100f;
    const float factor = usable ? 127.f / largest : 0.f;
    scales[g] = !finite ? NAN : usable ? largest / 127.f : 0.f;
    for (int64_t i = 0; i < columns; ++i)
      q[g * q_group_stride + i] =
          usable ? (int8_t)rintf(load_float(x, dtype, begin + i) * factor) : (int8_t)0;
  }
}

}  // namespace qkern
