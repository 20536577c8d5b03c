// SPDX-License-Identifier: Apache-2.0
// c = a . b of int8, exact int32 sums, without vector instructions: the reference.

#include "kernels.h"

namespace qkern {

void int8_matmul_scalar(const MatmulJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  for (int64_t m = m0; m < m1; ++m)
    for (int64_t n = n0; n < n1; ++n) {
      const int8_t* a = job.a + m * job.a_stride;
      const int8_t* b = job.b + n * job.b_stride;
      int32_t sum = 0;
      for (int64_t k = 0; k < job.k; ++k) sum += a[k] * b[k];
      job.c[m * job.c_stride + n] = sum;
    }
}

}  // namespace qkern
