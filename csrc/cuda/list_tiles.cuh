// SPDX-License-Identifier: Apache-2.0
// The list of token tiles of a mixture of experts (experts.cuh).
// Compiled and host-tested; no GPU has run it.
#pragma once

#include "device.cuh"
#include "experts.cuh"

namespace qkern {
namespace cuda {

constexpr int kListThreads = 256;

// One block of threads. `count` tiles of at most `tokens` rows.
__global__ void __launch_bounds__(kListThreads)
    list_tiles_kernel(const int64_t* offsets, int64_t experts, int64_t m, int tokens, int64_t count,
                      ExpertTile* tiles) {
  __shared__ int64_t ends[kListThreads];
  const int thread = threadIdx.x;
  int64_t begin = 0;
  for (int64_t base = 0; base < experts; base += kListThreads) {
    const int64_t e = base + thread;
    int64_t low = 0, high = 0;
    if (e < experts) {
      low = min(max(offsets[e], (int64_t)0), m);
      high = min(max(offsets[e + 1], low), m);
    }
    const int64_t mine = div_up<int64_t>(high - low, tokens);
    ends[thread] = mine;
    __syncthreads();
    for (int distance = 1; distance < kListThreads; distance *= 2) {
      const int64_t before = thread >= distance ? ends[thread - distance] : 0;
      __syncthreads();
      ends[thread] += before;
      __syncthreads();
    }
    const int64_t first = begin + ends[thread] - mine;
    for (int64_t t = 0; t < mine && first + t < count; ++t) {
      const int64_t row = low + t * tokens;
      tiles[first + t] = {(int32_t)e, (int32_t)min(high - row, (int64_t)tokens), row};
    }
    begin += ends[kListThreads - 1];
    __syncthreads();
  }
  for (int64_t i = begin + thread; i < count; i += kListThreads) tiles[i] = {0, 0, 0};
}

}  // namespace cuda
}  // namespace qkern
