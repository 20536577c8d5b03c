// SPDX-License-Identifier: Apache-2.0
// Mixture of experts: rows offsets[e] .. offsets[e + 1] of the batch belong to expert e. The
// offsets stay on the device: a small kernel turns them into a list of token tiles, one expert
// each, whose length is bounded by sizes alone; the linear kernels read their tile there and leave
// if there is none. What offsets say beyond the batch, or twice, is cut off.
#pragma once

#include "layout.cuh"

namespace qkern {
namespace cuda {

struct alignas(16) ExpertTile {
  int32_t expert, rows;  // rows 0: nothing to do
  int64_t first;
};

// Tiles that any offsets can need: each expert with rows has at most one that is not full.
QK_HD int64_t most_tiles(int64_t m, int64_t experts, int tokens) {
  return m / tokens + (experts < m ? experts : m);
}

// The expert of a row; the nearest one where it has none.
QK_HD int64_t expert_of(const int64_t* offsets, int64_t experts, int64_t row) {
  int64_t low = 0, high = experts - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (offsets[middle] <= row)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

}  // namespace cuda
}  // namespace qkern
