// SPDX-License-Identifier: Apache-2.0
// The gradient of a linear layer to its input, straight from the packed weight of any format:
//
//   dx[m, k] = sum over n of dy[m, n] * w[n, k]
//
// The sum runs over the rows of W, each with its own scale, so the operand is the scaled weight:
// the value of qk_cuda_dequantize, rounded once to the type of dy. It is made once per 64 x 64
// block and 128 tokens, in shared memory, where ldmatrix.trans turns it round: packed fragments
// pair neighbours along K, this product needs pairs along N.
//
// A block of eight warps owns 128 tokens and one column block; per row tile of 64
//   1. cp.async has brought the packed block and 128 x 64 of dy, three stages deep
//   2. each warp turns 16 columns of 32 rows into floats: 16 weights per lane
//   3. each warp multiplies 32 tokens x 32 columns: 8 mma.sync per 4 ldmatrix
// Nothing is split: row tiles ascend, so a row of dx has the same bits in every batch.
// Rows of weights in shared memory are 144 bytes: stores and ldmatrix hit 32 banks (stores of the
// orders for int8 activations 16, two lanes each).
// Tables are read through the first-level cache, an entry per weight.
//
// Numbers: w rounded once, float32 sums of the matrix unit, one rounding at the end.
// Compiled and host-tested; no GPU has run it.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "weights.cuh"

namespace qkern {
namespace cuda {

constexpr int kGradTokens = 128, kGradThreads = 256, kGradStages = 3;

struct GradParams {
  Weights w;
  const void* dy;      // 16-bit; rows start at multiples of 16 bytes
  int64_t dy_stride;   // elements
  int64_t dy_columns;  // that may be read
  int64_t m;
  void* dx;
  int64_t dx_stride;
};

template <int kBits>
struct GradTile {
  static constexpr int kPieces = kTileRows * 2 / 16;  // of a row of dy
  static constexpr int kCodeBytes = kBits * kVectorBytes;
  static constexpr int kStageBytes = kCodeBytes + kGradTokens * kPieces * 16;
  static constexpr int kWeightRow = kBlockColumns * 2 + 16;
  static constexpr int kSharedBytes = kGradStages * kStageBytes + kTileRows * kWeightRow;
};

// What a warp turns into floats: columns j = part % 4 of 16, rows 32 (part / 4) and up.
template <int kPart>
using Part = std::integral_constant<int, kPart>;

template <class T, Order kOrder, int kBits>
__global__ void __launch_bounds__(kGradThreads)
    gradient_kernel(const __grid_constant__ GradParams p) {
  using D = GradTile<kBits>;
  QKERN_DYNAMIC_SHARED(shared);
  uint8_t* const weights = shared + kGradStages * D::kStageBytes;
  const Layout& l = p.w.layout;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t k_block = blockIdx.x, first_token = (int64_t)blockIdx.y * kGradTokens;
  const int row_tiles = (int)l.row_tiles;

  // ---- stages: one packed block, 128 rows of dy ----
  const int piece = thread % D::kPieces, first_row = thread / D::kPieces;
  constexpr int kRowStep = kGradThreads / D::kPieces;
  const uint8_t* codes = p.w.packed + l.codes_offset + k_block * l.block_bytes;
  const uint8_t* dy =
      (const uint8_t*)p.dy + ((first_token + first_row) * p.dy_stride + piece * 8) * 2;
  int64_t columns_left = p.dy_columns - piece * 8;
  const int tokens_left = (int)min(p.m - first_token, (int64_t)kGradTokens) - first_row;
  int to_copy = row_tiles;
  uint32_t slot = shared_address(shared);
  const uint32_t slots_end = slot + kGradStages * D::kStageBytes;
  const auto copy_next = [&] {
    if (to_copy > 0) {
      if (thread < D::kCodeBytes / 16) copy_async(slot + thread * 16, codes + thread * 16, true);
#pragma unroll
      for (int r = 0; r < kGradTokens; r += kRowStep) {
        const int row = r + first_row;
        copy_async(slot + D::kCodeBytes + (row * D::kPieces + (piece ^ (row & 7))) * 16,
                   dy + r * p.dy_stride * 2, r < tokens_left && columns_left > 0);
      }
      codes += l.k_blocks * l.block_bytes;
      dy += kTileRows * 2;
      columns_left -= kTileRows;
      slot += D::kStageBytes;
      if (slot == slots_end) slot -= kGradStages * D::kStageBytes;
      --to_copy;
    }
    commit_copies();
  };
  for (int s = 0; s < kGradStages - 1; ++s) copy_next();

  // ---- what this warp turns into floats: columns j of the block, rows 32 i2 .. 32 i2 + 31 ----
  const int warp_j = warp % 4, warp_i = warp / 4 * 2;
  const int64_t group =
      min((int64_t)((uint32_t)(k_block * kBlockColumns + 16 * warp_j) / (uint32_t)l.group_padded),
          l.groups - 1);
  float scale[4], zero[4];
  const auto load_scales = [&](int tile) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t row = (int64_t)tile * kTileRows + 16 * warp_i + 8 * r + lane / 4;
      scale[r] = p.w.scale(row, group);
      zero[r] = p.w.zero(row, group);
    }
  };
  const auto convert_part = [&](auto part, const Vector* block, int tile) {
    constexpr int j = part.value % 4, i = part.value / 4 * 2;
    Vector vectors[kBits];
#pragma unroll
    for (int v = 0; v < kBits; ++v) vectors[v] = block[v * 32];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t row = (int64_t)tile * kTileRows + 16 * i + 8 * r + lane / 4;
      uint16_t value[4];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const int code = lane_code<kOrder, kBits>(vectors, {i + r / 2, r % 2, j, s});
        value[s] = T::from_float(row < l.n ? p.w.value(row, group, code, scale[r], zero[r]) : 0.f);
      }
#pragma unroll
      for (int s = 0; s < 4; s += 2) {
        const Slot place = {i + r / 2, r % 2, j, s};
        *(uint32_t*)(weights + block_row(place, lane) * D::kWeightRow +
                     block_column(kOrder, place, lane) * 2) = value[s] | (uint32_t)value[s + 1]
                                                                             << 16;
      }
    }
  };
  const auto convert = [&](const Vector* block, int tile) {
    switch (warp) {  // so that shifts are known when this is compiled
      case 0:
        return convert_part(Part<0>{}, block, tile);
      case 1:
        return convert_part(Part<1>{}, block, tile);
      case 2:
        return convert_part(Part<2>{}, block, tile);
      case 3:
        return convert_part(Part<3>{}, block, tile);
      case 4:
        return convert_part(Part<4>{}, block, tile);
      case 5:
        return convert_part(Part<5>{}, block, tile);
      case 6:
        return convert_part(Part<6>{}, block, tile);
      default:
        return convert_part(Part<7>{}, block, tile);
    }
  };

  // ---- main loop ----
  const int warp_token = warp % 4 * 32, warp_column = warp / 4 * 32;
  const int half_row = lane % 16, half_column = lane / 16;  // of four matrices of ldmatrix
  float sums[2][4][4] = {};
  uint32_t read_slot = 0;
  load_scales(0);
#pragma unroll 1
  for (int tile = 0; tile < row_tiles; ++tile) {
    wait_copies<kGradStages - 2>();
    __syncthreads();  // this stage has come, and the weights of the last tile are read
    copy_next();
    const uint8_t* const stage = shared + read_slot;
    read_slot += D::kStageBytes;
    if (read_slot == kGradStages * D::kStageBytes) read_slot = 0;
    convert((const Vector*)stage + lane, tile);
    if (tile + 1 < row_tiles) load_scales(tile + 1);
    __syncthreads();
    const uint32_t dy_from = shared_address(stage + D::kCodeBytes);
    const uint32_t w_from =
        shared_address(weights) + half_row * D::kWeightRow + (warp_column + half_column * 8) * 2;
#pragma unroll
    for (int step = 0; step < kTileRows / 16; ++step) {
      uint32_t a[2][4], b[4][2];
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        const int row = warp_token + 16 * f + half_row;
        ldmatrix_x4(a[f],
                    dy_from + (row * D::kPieces + ((2 * step + half_column) ^ (row & 7))) * 16);
      }
#pragma unroll
      for (int c = 0; c < 4; c += 2)
        ldmatrix_x4_transposed(b[c], w_from + step * 16 * D::kWeightRow + c * 16);
#pragma unroll
      for (int f = 0; f < 2; ++f)
#pragma unroll
        for (int c = 0; c < 4; ++c) mma(T{}, sums[f][c], a[f], b[c]);
    }
  }
  wait_copies<0>();

  // ---- two neighbouring columns per lane, fragment and row ----
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int64_t padded = k_block * kBlockColumns + warp_column + 8 * c + 2 * (lane % 4);
    int64_t column[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      column[e] = l.column_of(padded + e);
      if (column[e] >= 0) column[e] = p.w.input_column(column[e]);
    }
#pragma unroll
    for (int f = 0; f < 2; ++f)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t token = first_token + warp_token + 16 * f + 8 * h + lane / 4;
        if (token >= p.m) continue;
        uint16_t* const row = (uint16_t*)p.dx + token * p.dx_stride;
        const uint16_t low = T::from_float(sums[f][c][2 * h]);
        const uint16_t high = T::from_float(sums[f][c][2 * h + 1]);
        if (column[0] >= 0 && column[1] == column[0] + 1 && (uintptr_t)(row + column[0]) % 4 == 0) {
          *(uint32_t*)(row + column[0]) = low | (uint32_t)high << 16;
        } else {
          if (column[0] >= 0) row[column[0]] = low;
          if (column[1] >= 0) row[column[1]] = high;
        }
      }
  }
}

}  // namespace cuda
}  // namespace qkern
