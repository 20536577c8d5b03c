// SPDX-License-Identifier: Apache-2.0
// What a linear kernel is told, how its shared memory is divided, and how an output ends: shared by
// the main kernel (linear.cuh) and the sum of its splits.
#pragma once

#include <type_traits>

#include "convert_tables.cuh"
#include "device.cuh"
#include "experts.cuh"
#include "schedule.h"

namespace qkern {
namespace cuda {

struct LinearParams {
  const uint8_t* codes;
  const uint8_t* scales;  // NULL: 1
  const uint8_t* zeros;   // NULL: symmetric
  qk_dtype scale_dtype, zero_dtype;
  const float* table;     // NULL: integers through a table
  int64_t table_stride;   // entries from row to row
  const uint8_t* tables;  // block tables
  int table_bytes;        // of a row tile and group
  bool shared_tables;     // one per 8 rows
  float table_scale;
  float center;  // 2^(bits - 1)
  const void* x;
  int64_t x_stride;   // elements; rows start at multiples of 16 bytes
  int64_t x_columns;  // columns that may be read
  int64_t m, n, k_blocks, row_tiles;
  int64_t row_groups, token_tiles, stages;
  int segment_steps;               // steps per scale group; 0: one group
  int stage_segments, stage_rest;  // steps of a stage = stage_segments * segment_steps + stage_rest
  int segments;                    // those that hold columns: what lies behind is padding
  int groups;                      // of scales per row
  int stage_groups;                // groups staged per stage: scales, zeros, block tables
  bool segment_sums;               // sums are scaled per segment; else once, at the end
  int exact;                       // int8: sums stay integers to the end
  const float* x_scales;           // int8: [m][x_groups]
  int64_t x_groups;                // above 1: applied per segment
  const void* bias;
  qk_dtype bias_dtype, y_dtype;
  void* y;
  int64_t y_stride;
  uint32_t* partials;         // [split][m][row_tiles * 64] where split > 1
  const ExpertTile* tiles;    // mixture of experts: whose rows a token tile holds; NULL: one weight
  int64_t expert_bytes;       // from weight to weight
  const float* table_scales;  // of every expert; NULL: table_scale
};

// What a block of threads multiplies: some rows of the batch, and the weight that is theirs. Four
// registers through the main loop; what follows from them is computed where it is needed.
struct Share {
  int64_t first_token;
  int tokens, expert;

  __device__ __forceinline__ int64_t weight(const LinearParams& p) const {
    return expert * p.expert_bytes;  // from the first weight
  }
  __device__ __forceinline__ float bias(const LinearParams& p, int64_t row) const {
    return load_number(p.bias, p.bias_dtype, expert * p.n + row);
  }
  __device__ __forceinline__ float table_scale(const LinearParams& p) const {
    return p.table_scales ? p.table_scales[expert] : p.table_scale;
  }
};
__device__ __forceinline__ Share share_of(const LinearParams& p, int64_t token_tile, int tokens) {
  if (!p.tiles) {
    const int64_t first = token_tile * tokens;
    return {first, (int)min(p.m - first, (int64_t)tokens), 0};
  }
  const ExpertTile t = p.tiles[token_tile];
  return {t.first, t.rows, t.expert};
}

// The end of every output, in the kernel or after the splits have been added up.
template <bool kBytes>
__device__ __forceinline__ float finish(const LinearParams& p, const Share& share, uint32_t sum,
                                        int64_t token, int64_t row, int shift) {
  float value = __uint_as_float(sum);
  if constexpr (kBytes) {
    if (p.exact) {
      const float scale =
          p.scales ? load_number(p.scales + share.weight(p), p.scale_dtype,
                                 row / kTileRows * kTileRows + scale_place((int)(row % kTileRows)))
                   : 1.f;
      value = mul_rn((float)((int32_t)sum >> shift), scale);
    }
    if (p.x_groups == 1) {
      const float scale = mul_rn(p.x_scales[token], share.table_scale(p));
      return p.bias ? fma_rn(value, scale, share.bias(p, row)) : mul_rn(value, scale);
    }
  }
  return p.bias ? __fadd_rn(value, share.bias(p, row)) : value;
}

// Eight neighbouring scales or zeros; one branch on their type for all, in the main loop it counts.
__device__ __forceinline__ void load_eight(const uint8_t* from, qk_dtype dtype, float* out) {
  const Vector low = *(const Vector*)from;
  if (dtype == QK_F32) {
    const Vector high = ((const Vector*)from)[1];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      out[e] = __uint_as_float(low.word[e]);
      out[4 + e] = __uint_as_float(high.word[e]);
    }
  } else if (dtype == QK_F16) {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      out[e] = F16::to_float((uint16_t)(low.word[e / 2] >> (16 * (e % 2))));
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      out[e] = BF16::to_float((uint16_t)(low.word[e / 2] >> (16 * (e % 2))));
  }
}

template <class C, int kShape>
struct Chassis {
  static constexpr Shape kS = shape_of(kShape, C::kBytes);
  static constexpr int kFragments = kS.fragments;
  static constexpr int kSteps = C::kBytes ? 2 : 4;  // per block
  QK_HD static constexpr uint32_t ones() {
    if constexpr (C::kBytes)
      return S8::kOnes;
    else
      return C::Type::kOnes;
  }
  static constexpr int kBlockBytes = C::kBits * kVectorBytes;
  static constexpr int kCodeBytes = kS.warps_rows * kS.stage_blocks() * kBlockBytes;
  static constexpr int kPieces = kS.stage_columns() * (C::kBytes ? 1 : 2) / 16;  // per row of x
  static constexpr int kBlockPieces = C::kBytes ? 4 : 8;
  static constexpr int kStageBytes = kCodeBytes + kS.tokens() * kPieces * 16;
  static constexpr int kRows = kS.warps_rows * kTileRows;
  static constexpr int kSumStride = kRows + 4;  // 32 lanes of a store hit 32 banks

  // Fixed part of shared memory: tables, and one factor per row where they were divided.
  static constexpr bool kFactors =
      C::kTables == Tables::kPairs || (C::kTables == Tables::kRows && !C::kBytes);
  QK_HD static constexpr int table_bytes() {
    if constexpr (C::kTables == Tables::kPairs) return C::kTableWords * 4 + 128;
    if constexpr (C::kTables == Tables::kRows)
      return kRows * ((int)sizeof(typename C::Registers) + (kFactors ? 4 : 0));
    return 0;
  }
  // Of a row tile and group, at most.
  QK_HD static constexpr int block_table_bytes() {
    if constexpr (C::kTables == Tables::kBlocks) return kTileRows * sizeof(typename C::Registers);
    return 0;
  }
  static constexpr bool kZeros =
      C::kTables == Tables::kNone || (C::kTables == Tables::kRows && C::kBits != 4);
  static constexpr int kWorstGroupBytes = worst_group_bytes(
      kS, groups_per_block(C::kBytes, C::kTables == Tables::kBlocks), kZeros, block_table_bytes());
  static constexpr int kStages = stage_count(kStageBytes + kWorstGroupBytes, table_bytes());
  static_assert(kPieces % 8 == 0 && kStageBytes % 128 == 0 && table_bytes() % 128 == 0);
  static_assert(kS.threads() % kPieces == 0, "a thread copies the same column of every row");

  static int group_bytes(const LinearParams& p) {
    const int scale_size = p.scales ? dtype_size(p.scale_dtype) : 0;
    const int zero_size = p.zeros ? dtype_size(p.zero_dtype) : 0;
    return kS.warps_rows * p.stage_groups * (kTileRows * (scale_size + zero_size) + p.table_bytes);
  }
  static int shared_bytes(const LinearParams& p) {
    const int ring = kStages * (kStageBytes + group_bytes(p));
    return table_bytes() + (ring > sums_bytes(kS) ? ring : sums_bytes(kS));
  }
};

// Partial sums of all splits, ascending; four outputs per thread. A block of threads has a token of
// a tile of `tokens`, as the tiles of the kernel that made the sums.
constexpr int kAddThreads = 128, kAddRows = 4 * kAddThreads;
template <bool kBytes>
__global__ void __launch_bounds__(kAddThreads)
    add_splits(const __grid_constant__ LinearParams p, int tokens, int split, int shift) {
  const int64_t rows = p.row_tiles * kTileRows;
  const int64_t row = ((int64_t)blockIdx.y * kAddThreads + threadIdx.x) * 4;
  const Share share = share_of(p, blockIdx.x / tokens, tokens);
  const int in_tile = blockIdx.x % tokens;
  if (row >= p.n || in_tile >= share.tokens) return;
  const int64_t token = share.first_token + in_tile;
  Vector total = *(const Vector*)(p.partials + token * rows + row);
  for (int z = 1; z < split; ++z) {
    const Vector next = *(const Vector*)(p.partials + (z * p.m + token) * rows + row);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      total.word[e] = kBytes && p.exact ? total.word[e] + next.word[e]
                                        : __float_as_uint(__fadd_rn(__uint_as_float(total.word[e]),
                                                                    __uint_as_float(next.word[e])));
  }
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (row + e < p.n)
      store_number(p.y, p.y_dtype, token * p.y_stride + row + e,
                   finish<kBytes>(p, share, total.word[e], token, row + e, shift));
}

}  // namespace cuda
}  // namespace qkern
