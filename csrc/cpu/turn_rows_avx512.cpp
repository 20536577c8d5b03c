// SPDX-License-Identifier: Apache-2.0
// Rows of int8 as tiles of four columns per dword (kernels.h, TurnRows): 64 shuffles per KiB.

#include "kernels.h"
#include "simd/rows_avx512.h"
#include "simd/transpose_avx512.h"

namespace qkern {

void turn_rows_avx512(const MatmulJob& job, int64_t m, int64_t t0, int64_t t1, int8_t* to) {
  to += t0 * turned_tile_bytes(job.k);
  for (int64_t row = t0 * kTurnedRows; row < min64(m, t1 * kTurnedRows); row += kTurnedRows) {
    for (int64_t k = 0; k < job.k; k += 64, to += 64 * kTurnedRows) {
      const __mmask64 mask = first_bytes(job.k - k);
      __m512i v[kTurnedRows];
#pragma GCC unroll 16
      for (int r = 0; r < kTurnedRows; ++r)
        v[r] =
            _mm512_maskz_loadu_epi8(row + r < m ? mask : 0, job.a + (row + r) * job.a_stride + k);
      transpose_16x16(v);
#pragma GCC unroll 16
      for (int i = 0; i < kTurnedRows; ++i) _mm512_store_si512(to + 64 * i, v[i]);
    }
  }
}

}  // namespace qkern
