// SPDX-License-Identifier: Apache-2.0
// The chassis of every linear kernel of the mma.sync family (sm_80 and up):
//
//   y[m, n] = sum over k of x[m, k] * w[n, k] (+ bias)
//
// The product is computed transposed: weights are the 16-row operand A, built in registers by a
// converter (convert.cuh) from the layout of layout.cuh; activations are the 8-column operand B, so
// that a batch of one wastes seven columns and no weights. Work is cut up by schedule.h.
//
// Main loop, per stage: cp.async brings 16-byte pieces of packed weights, activations and scales
// into a ring in shared memory, one barrier per stage; then each warp, for its 64 x 64 block and
// each step of 16 (int8: 32) columns,
//   1. reads its words, one LDS.128 per 16 bytes, each lane its own 16 bytes: no bank conflicts
//   2. reads activations with ldmatrix; 16-byte pieces of a row are stored at (piece xor row % 8)
//   3. converts and multiplies: 4 x fragments mma.sync
//   4. at the end of a scale group adds scale * (sum - zero * sum of x) to its float32 results
// After the loop the warps along K add their results in ascending order through shared memory.
//
// Numbers. Codes minus 2^(b-1) and activations are exact in the operands. The matrix unit sums in
// float32 (int32) within a group; scales, zeros and table_scale are float32. With zeros the sum of
// activations is a product with ones. Tables are rounded to the type of the activations after
// division by a power of two (convert.cuh). int8 with one scale per row, symmetric, K <= 65536:
// sums are exact integers over all of K and the result has the bits of the CPU kernels. All other
// results differ from the CPU's by the order of float32 additions only (and tables by rounding).
// Nothing depends on M inside a family of schedule.h; there are no atomics and no locks.
//
// Register budget (per thread): fragments 4: 64 results + 64 sums + 8 activations + converter
// (Table<4>: 64 for eight rows) + addresses; check_sass.py fails on any spill.
//
// Compiled for sm_80..sm_120a and host-tested (layout, converters, schedules, and this loop in its
// own order: host_test/). No GPU has run it.
#pragma once

#include <type_traits>

#include "convert.cuh"
#include "device.cuh"
#include "schedule.h"

namespace qkern {
namespace cuda {

struct LinearParams {
  const uint8_t* codes;
  const uint8_t* scales;  // NULL: 1
  const uint8_t* zeros;   // NULL: symmetric
  qk_dtype scale_dtype, zero_dtype;
  const float* table;    // NULL: integers through a table
  int64_t table_stride;  // entries from row to row
  float table_scale;
  float center;  // 2^(bits - 1)
  const void* x;
  int64_t x_stride;   // elements; rows start at multiples of 16 bytes
  int64_t x_columns;  // columns that may be read
  int64_t m, n, k_blocks, row_tiles;
  int64_t row_groups, token_tiles, stages;
  int segment_steps;      // steps per scale group; 0: one group
  int segments;           // those that hold columns: what lies behind is padding
  int groups;             // of scales per row
  int stage_groups;       // scale groups staged per stage
  int exact;              // int8: sums stay integers to the end
  const float* x_scales;  // int8: [m][x_groups]
  int64_t x_groups;       // above 1: applied per segment
  const void* bias;
  qk_dtype bias_dtype, y_dtype;
  void* y;
  int64_t y_stride;
  uint32_t* partials;  // [split][m][row_tiles * 64] where split > 1
};

// The end of every output, in the kernel or after the splits have been added up.
template <bool kBytes>
__device__ __forceinline__ float finish(const LinearParams& p, uint32_t sum, int64_t token,
                                        int64_t row, int shift) {
  float value = __uint_as_float(sum);
  if constexpr (kBytes) {
    if (p.exact) {
      const float scale =
          p.scales ? load_number(p.scales, p.scale_dtype,
                                 row / kTileRows * kTileRows + scale_place((int)(row % kTileRows)))
                   : 1.f;
      value = mul_rn((float)((int32_t)sum >> shift), scale);
    }
    if (p.x_groups == 1) {
      const float scale = p.x_scales[token];
      return p.bias ? fma_rn(value, scale, load_number(p.bias, p.bias_dtype, row))
                    : mul_rn(value, scale);
    }
  }
  return p.bias ? __fadd_rn(value, load_number(p.bias, p.bias_dtype, row)) : value;
}

// Eight neighbouring scales or zeros.
__device__ __forceinline__ void load_eight(const uint8_t* from, qk_dtype dtype, float* out) {
  if (dtype == QK_F32) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const Vector four = ((const Vector*)from)[v];
#pragma unroll
      for (int e = 0; e < 4; ++e) out[4 * v + e] = __uint_as_float(four.word[e]);
    }
    return;
  }
  const Vector eight = *(const Vector*)from;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    out[e] = half_to_float((uint16_t)(eight.word[e / 2] >> (16 * (e % 2))), dtype);
  }
}

template <class C, int kShape>
struct Chassis {
  static constexpr Shape kS = shape_of(kShape, C::kBytes);
  static constexpr int kFragments = kS.fragments;
  static constexpr int kSteps = C::kBytes ? 2 : 4;  // per block
  static constexpr int kBlockBytes = C::kBits * kVectorBytes;
  static constexpr int kCodeBytes = kS.warps_rows * kS.stage_blocks() * kBlockBytes;
  static constexpr int kPieces = kS.stage_columns() * (C::kBytes ? 1 : 2) / 16;  // per row of x
  static constexpr int kBlockPieces = C::kBytes ? 4 : 8;
  static constexpr int kStageBytes = kCodeBytes + kS.tokens() * kPieces * 16;
  static constexpr int kRows = kS.warps_rows * kTileRows;
  static constexpr int kSumStride = kRows + 4;  // 32 lanes of a store hit 32 banks

  // Fixed part of shared memory: tables, and one factor per row.
  QK_HD static constexpr int table_bytes() {
    if constexpr (C::kPairTable) return C::kTableWords * 4 + 128;
    if constexpr (C::kRowTables) return kRows * (RowTable<C::kBits>::kWords * 8 + 4);
    return 0;
  }
  static constexpr bool kZeros = C::kBits != 4 || !(C::kPairTable || C::kRowTables);
  static constexpr int kStages = stage_count(kS, C::kBits, C::kBytes, kZeros, table_bytes());
  static_assert(kPieces % 8 == 0 && kStageBytes % 128 == 0 && table_bytes() % 128 == 0);
  static_assert(kS.threads() % kPieces == 0, "a thread copies the same column of every row");

  static int scale_bytes(const LinearParams& p) {
    return kS.warps_rows * p.stage_groups * kTileRows *
           ((p.scales ? dtype_size(p.scale_dtype) : 0) + (p.zeros ? dtype_size(p.zero_dtype) : 0));
  }
  static int shared_bytes(const LinearParams& p) {
    const int ring = kStages * (kStageBytes + scale_bytes(p));
    return table_bytes() + (ring > sums_bytes(kS) ? ring : sums_bytes(kS));
  }
};

template <class C, int kShape>
__global__ void __launch_bounds__(Chassis<C, kShape>::kS.threads(), 1)
    linear_kernel(const __grid_constant__ LinearParams p) {
  using D = Chassis<C, kShape>;
  using Sum = std::conditional_t<C::kBytes, int32_t, float>;
  constexpr Shape kS = D::kS;
  constexpr int kN = D::kFragments;
  QKERN_DYNAMIC_SHARED(shared);
  uint8_t* const ring = shared + D::table_bytes();

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_k = warp % kS.warps_k;
  const int warp_token = warp / kS.warps_k % kS.warps_tokens;
  const int warp_row = warp / (kS.warps_k * kS.warps_tokens);
  const TileIndex tile = tile_of(blockIdx.x, p.row_groups, p.token_tiles);
  const int64_t first_tile = tile.row_group * kS.warps_rows;
  const int64_t first_token = tile.token_tile * kS.tokens();
  const int split = gridDim.y;
  const int stage_begin = (int)split_begin(p.stages, split, blockIdx.y);
  const int stage_end = (int)split_begin(p.stages, split, blockIdx.y + 1);
  const int k_blocks = (int)p.k_blocks;

  const bool zeros = D::kZeros && p.zeros;
  const int scale_size = p.scales ? (p.scale_dtype == QK_F32 ? 4 : 2) : 0;
  const int zero_size = zeros ? (p.zero_dtype == QK_F32 ? 4 : 2) : 0;
  const int staged = kS.warps_rows * p.stage_groups * kTileRows;
  const int slot_bytes = D::kStageBytes + staged * (scale_size + zero_size);

  // ---- copies ----
  const int x_piece = thread % D::kPieces, x_row = thread / D::kPieces;
  constexpr int kRowStep = kS.threads() / D::kPieces;
  constexpr int kElement = C::kBytes ? 1 : 2;
  const uint8_t* const x_from =
      (const uint8_t*)p.x + (first_token + x_row) * p.x_stride * kElement + x_piece * 16;
  const auto copy_group_rows = [&](uint8_t* to, const uint8_t* from, int size, int first_group) {
    const int pieces = kTileRows / 16 * size;  // per group
    for (int c = thread; c < kS.warps_rows * p.stage_groups * pieces; c += kS.threads()) {
      const int row = c / (p.stage_groups * pieces), in_row = c - row * p.stage_groups * pieces;
      const int group = first_group + in_row / pieces;
      const bool valid = first_tile + row < p.row_tiles && group < p.groups;
      const int64_t offset =
          valid ? ((first_tile + row) * p.groups + first_group) * kTileRows * size + in_row * 16
                : 0;
      copy_async(shared_address(to + c * 16), from + offset, valid ? 16 : 0);
    }
  };
  const auto copy_stage = [&](int stage) {
    uint8_t* const slot = ring + (stage - stage_begin) % D::kStages * slot_bytes;
    const int first_block = stage * kS.stage_blocks();
    constexpr int kRowCodes = kS.stage_blocks() * D::kBlockBytes / 16;  // pieces per row tile
    const int have = min(k_blocks - first_block, kS.stage_blocks()) * (D::kBlockBytes / 16);
#pragma unroll(kN == 4 ? 1 : D::kCodeBytes / 16)
    for (int c0 = 0; c0 < kS.warps_rows * kRowCodes; c0 += kS.threads()) {
      const int c = c0 + thread;
      const int row = c / kRowCodes, piece = c % kRowCodes;
      const bool valid = piece < have && first_tile + row < p.row_tiles;
      const int64_t offset =
          valid ? ((first_tile + row) * p.k_blocks + first_block) * D::kBlockBytes + piece * 16 : 0;
      if (kS.warps_rows * kRowCodes % kS.threads() == 0 || c < kS.warps_rows * kRowCodes)
        copy_async(shared_address(slot + c * 16), p.codes + offset, valid ? 16 : 0);
    }
    const int64_t column = (int64_t)stage * kS.stage_columns() + x_piece * (16 / kElement);
    const int64_t left = (p.x_columns - column) * kElement;
    const int valid_bytes = left < 0 ? 0 : left > 16 ? 16 : (int)left;
    // Not unrolled where registers are short: every copy would keep its own addresses.
#pragma unroll(kN == 4 ? 1 : kS.tokens() / kRowStep)
    for (int r = 0; r < kS.tokens(); r += kRowStep) {
      const int row = r + x_row;
      const bool valid = valid_bytes > 0 && first_token + row < p.m;
      const uint8_t* from =
          valid
              ? x_from + ((int64_t)r * p.x_stride + (int64_t)stage * kS.stage_columns()) * kElement
              : (const uint8_t*)p.x;
      copy_async(
          shared_address(slot + D::kCodeBytes + (row * D::kPieces + (x_piece ^ (row & 7))) * 16),
          from, valid ? valid_bytes : 0);
    }
    if (p.stage_groups) {
      const int first_group = first_block * D::kSteps / p.segment_steps;
      uint8_t* const scales = slot + D::kStageBytes;
      if (scale_size) copy_group_rows(scales, p.scales, scale_size, first_group);
      if (zero_size) copy_group_rows(scales + staged * scale_size, p.zeros, zero_size, first_group);
    }
  };

#pragma unroll
  for (int s = 0; s < D::kStages - 1; ++s) {
    if (stage_begin + s < stage_end) copy_stage(stage_begin + s);
    commit_copies();
  }

  // ---- tables, while the first stages arrive ----
  [[maybe_unused]] float* const factors =  // powers of two by which rows are multiplied at the end
      (float*)(shared + D::table_bytes() - (C::kPairTable ? 128 : D::kRows * 4));
  [[maybe_unused]] const uint32_t* pairs = nullptr;
  [[maybe_unused]] RowTable<C::kRowTables ? C::kBits : 2> tables[C::kRowTables ? 8 : 1];
  if constexpr (C::kPairTable) {
    uint16_t* const entries = (uint16_t*)(factors + 4);
    if (thread == 0) factors[0] = round_table<typename C::Type>(p.table, 16, false, entries);
    __syncthreads();
    for (int v = thread; v < C::kTableWords / 4; v += kS.threads()) {
      const int entry = v / 8;
      const uint32_t pair = entries[entry & 15] | (uint32_t)entries[entry >> 4] << 16;
      ((Vector*)shared)[v] = {{pair, pair, pair, pair}};
    }
    pairs = (const uint32_t*)shared + lane;
    __syncthreads();
  }
  if constexpr (C::kRowTables) {
    constexpr int kWords = RowTable<C::kBits>::kWords;
    using Stored = RowTable<C::kBits>;
    for (int row = thread; row < D::kRows; row += kS.threads()) {
      float entries[1 << C::kBits];
      uint16_t rounded[1 << C::kBits];
      const int64_t from = min(first_tile * kTileRows + row, p.n - 1);
#pragma unroll
      for (int e = 0; e < 1 << C::kBits; ++e)
        entries[e] = p.table ? p.table[from * p.table_stride + e] : (float)e - p.center;
      factors[row] = round_table<typename C::Type>(entries, 1 << C::kBits, !p.table, rounded);
      ((Stored*)shared)[row] = make_row_table<C::kBits>(rounded);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 8; ++r)
      tables[r] = ((const Stored*)shared)[warp_row * kTileRows + 8 * r + lane / 4];
    static_assert(sizeof(Stored) == kWords * 8);
  }

  // ---- main loop ----
  float results[4][kN][4];
  Sum sums[4][kN][4];
  Sum x_sums[kN][4];
  const auto clear_sums = [&] {
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x_sums[n][e] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i][n][e] = 0;
      }
  };
  clear_sums();
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) results[i][n][e] = 0.f;

  // results += scale * (sums - zero * x_sums); scales of the lane's eight rows, place 2 i + h.
  const auto add_segment = [&](const float* scale, const float* zero, int64_t segment) {
    float x_scale[kN][2];
    if constexpr (C::kBytes) {
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t token = first_token + (warp_token * kN + n) * 8 + 2 * (lane % 4) + e;
          x_scale[n][e] =
              p.x_groups > 1 && token < p.m ? p.x_scales[token * p.x_groups + segment] : 1.f;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = 2 * i + e / 2;
          float sum, factor = scale[r];
          if constexpr (C::kBytes) {
            int32_t s = sums[i][n][e] >> C::kShift;
            if (zeros) s += (int32_t)p.center * x_sums[n][e % 2];
            sum = zeros ? fma_rn(-zero[r], (float)x_sums[n][e % 2], (float)s) : (float)s;
            factor = mul_rn(factor, x_scale[n][e % 2]);
          } else {
            sum = zeros ? fma_rn(-zero[r], x_sums[n][e % 2], sums[i][n][e]) : sums[i][n][e];
          }
          results[i][n][e] = fma_rn(sum, factor, results[i][n][e]);
        }
    clear_sums();
  };
  // Zeros count from 2^(bits-1) where the operand does (not with int8: there the sums are moved).
  const auto prepare = [&](float* scale, float* zero) {
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      if (!p.scales) scale[r] = 1.f;
      if constexpr (!C::kBytes) {
        scale[r] = mul_rn(scale[r], p.table_scale);
        if (zeros) zero[r] = sub_rn(zero[r], p.center);
      }
    }
  };
  const auto add_only_group = [&](int64_t segment) {
    float scale[8], zero[8];
    const int64_t at = min(first_tile + warp_row, p.row_tiles - 1) * kTileRows + 8 * (lane / 4);
    if (p.scales) load_eight(p.scales + at * scale_size, p.scale_dtype, scale);
    if (zeros) load_eight(p.zeros + at * zero_size, p.zero_dtype, zero);
    prepare(scale, zero);
    add_segment(scale, zero, segment);
  };

  const int x_lane_row = (warp_token * kN + (kN > 1 ? lane / 16 : 0)) * 8 + lane % 8;
  const int x_lane_piece = (lane / 8 % 2) ^ (lane % 8);
  const int last_block = min(k_blocks, stage_end * kS.stage_blocks()) - 1;

  for (int stage = stage_begin; stage < stage_end; ++stage) {
    wait_copies<D::kStages - 2>();
    __syncthreads();
    if (stage + D::kStages - 1 < stage_end) copy_stage(stage + D::kStages - 1);
    commit_copies();

    const uint8_t* const slot = ring + (stage - stage_begin) % D::kStages * slot_bytes;
    const int first_group =
        p.stage_groups ? stage * kS.stage_blocks() * D::kSteps / p.segment_steps : 0;
    const auto add_staged_group = [&](int segment) {
      float scale[8], zero[8];
      const int at =
          ((warp_row * p.stage_groups + segment - first_group) * kTileRows) + lane / 4 * 8;
      const uint8_t* const scales = slot + D::kStageBytes;
      if (p.scales) load_eight(scales + at * scale_size, p.scale_dtype, scale);
      if (zeros) load_eight(scales + staged * scale_size + at * zero_size, p.zero_dtype, zero);
      prepare(scale, zero);
      add_segment(scale, zero, segment);
    };

#pragma unroll 1
    for (int b = 0; b < kS.warp_blocks; ++b) {
      const int in_stage = warp_k * kS.warp_blocks + b;
      const int block = stage * kS.stage_blocks() + in_stage;
      if (block > last_block) break;
      int segment = 0, left = 0;
      if (p.segment_steps) {
        segment = block * D::kSteps / p.segment_steps;
        left = (segment + 1) * p.segment_steps - block * D::kSteps;
      }
      const Vector* const words =
          (const Vector*)(slot + (warp_row * kS.stage_blocks() + in_stage) * D::kBlockBytes) + lane;
      const uint32_t x_row_address =
          shared_address(slot + D::kCodeBytes) +
          (x_lane_row * D::kPieces + in_stage * D::kBlockPieces / 8 * 8) * 16;
#pragma unroll(C::kRowTables&& kN == 4 ? 1 : D::kSteps)  // tables leave no registers to spare
      for (int step = 0; step < D::kSteps; ++step) {
        const auto w = C::load(words, step);
        uint32_t x[kN][2];
        const int piece = (in_stage * D::kBlockPieces % 8 + 2 * step) ^ x_lane_piece;
        if constexpr (kN == 1) {
          ldmatrix_x2(x[0], x_row_address + piece * 16);
        } else {
#pragma unroll
          for (int n = 0; n < kN; n += 2)
            ldmatrix_x4(x[n], x_row_address + (n * 8 * D::kPieces + piece) * 16);
        }
        const auto multiply = [&](Sum* d, const uint32_t* a, const uint32_t* b_) {
          if constexpr (C::kBytes)
            mma(S8{}, d, a, b_);
          else
            mma(typename C::Type{}, d, a, b_);
        };
        if (zeros) {
          uint32_t ones[4];
#pragma unroll
          for (int r = 0; r < 4; ++r)
            if constexpr (C::kBytes)
              ones[r] = S8::kOnes;
            else
              ones[r] = C::Type::kOnes;
#pragma unroll
          for (int n = 0; n < kN; ++n) multiply(x_sums[n], ones, x[n]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t a[4];
          if constexpr (C::kPairTable)
            C::fragment(w.tile[i], pairs, a);
          else if constexpr (C::kRowTables)
            C::fragment(w.tile[i], step, tables + 2 * i, a);
          else
            C::fragment(w.tile[i], step, a);
#pragma unroll
          for (int n = 0; n < kN; ++n) multiply(sums[i][n], a, x[n]);
        }
        if (p.segment_steps) {
          const bool at_end = step == D::kSteps - 1 && (kS.warps_k > 1 || block == last_block);
          if (--left == 0 || at_end) {
            if (segment < p.segments) {
              if (p.stage_groups)
                add_staged_group(segment);
              else
                add_only_group(segment);
            }
            ++segment;
            left = p.segment_steps;
          }
        }
      }
    }
  }
  if (!p.segment_steps && !p.exact) add_only_group(0);

  // ---- results: through shared memory, so that warps along K are added in order and rows of y are
  // written in whole vectors
  wait_copies<0>();
  __syncthreads();
  uint32_t* const cells = (uint32_t*)ring;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = (warp_token * kN + n) * 8 + 2 * (lane % 4) + e % 2;
        const int row = warp_row * kTileRows + 16 * i + 8 * (e / 2) + lane / 4;
        uint32_t value = __float_as_uint(results[i][n][e]);
        if constexpr (C::kBytes)
          if (p.exact) value = (uint32_t)sums[i][n][e];
        cells[(warp_k * kS.tokens() + token) * D::kSumStride + row] = value;
      }
  __syncthreads();
  const int y_size = p.y_dtype == QK_F32 ? 4 : 2;
  for (int c = thread; c < kS.tokens() * (D::kRows / 8); c += kS.threads()) {
    const int in_token = c / (D::kRows / 8), in_row = c % (D::kRows / 8) * 8;
    const int64_t token = first_token + in_token, row = first_tile * kTileRows + in_row;
    if (token >= p.m || row >= p.row_tiles * kTileRows) continue;
    uint32_t total[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const uint32_t* cell = cells + in_token * D::kSumStride + in_row + r;
      total[r] = cell[0];
#pragma unroll
      for (int k = 1; k < kS.warps_k; ++k) {
        const uint32_t next = cell[k * kS.tokens() * D::kSumStride];
        total[r] =
            C::kBytes && p.exact
                ? total[r] + next
                : __float_as_uint(__fadd_rn(__uint_as_float(total[r]), __uint_as_float(next)));
      }
      if constexpr (C::kPairTable || C::kRowTables)
        total[r] = __float_as_uint(
            mul_rn(__uint_as_float(total[r]), factors[C::kPairTable ? 0 : in_row + r]));
    }
    if (split > 1) {
      uint32_t* to = p.partials + (blockIdx.y * p.m + token) * (p.row_tiles * kTileRows) + row;
#pragma unroll
      for (int v = 0; v < 2; ++v)
        ((Vector*)to)[v] = {{total[4 * v], total[4 * v + 1], total[4 * v + 2], total[4 * v + 3]}};
      continue;
    }
    int shift = 0;
    if constexpr (C::kBytes) shift = C::kShift;
    uint8_t* const to = (uint8_t*)p.y + (token * p.y_stride + row) * y_size;
    if (y_size == 2 && row + 8 <= p.n && (uintptr_t)to % 16 == 0) {
      Vector packed;
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float low = finish<C::kBytes>(p, total[2 * v], token, row + 2 * v, shift);
        const float high = finish<C::kBytes>(p, total[2 * v + 1], token, row + 2 * v + 1, shift);
        packed.word[v] = p.y_dtype == QK_F16
                             ? F16::from_float(low) | (uint32_t)F16::from_float(high) << 16
                             : BF16::from_float(low) | (uint32_t)BF16::from_float(high) << 16;
      }
      *(Vector*)to = packed;
    } else {
#pragma unroll
      for (int r = 0; r < 8; ++r)
        if (row + r < p.n)
          store_number(p.y, p.y_dtype, token * p.y_stride + row + r,
                       finish<C::kBytes>(p, total[r], token, row + r, shift));
    }
  }
}

// Partial sums of all splits, ascending; four outputs per thread.
template <bool kBytes>
__global__ void __launch_bounds__(128)
    add_splits(const __grid_constant__ LinearParams p, int split, int shift) {
  const int64_t rows = p.row_tiles * kTileRows;
  const int64_t row = ((int64_t)blockIdx.x * 128 + threadIdx.x) * 4, token = blockIdx.y;
  if (row >= p.n) return;
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
                   finish<kBytes>(p, total.word[e], token, row + e, shift));
}

}  // namespace cuda
}  // namespace qkern
