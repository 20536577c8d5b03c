// SPDX-License-Identifier: Apache-2.0
// qk_cuda_dequantize: out[i, :] = a row of W, in the types F32, F16, BF16. Same bits as the CPU.
//
// Whole ranges of rows: one warp per 64 x 64 block. A lane reads its `bits` vectors of 16 bytes,
// unpacks them with shifts known at compile time, and the block is turned round in shared memory so
// that it leaves in 16-byte stores, 128 bytes per row (16-bit outputs).
//   smem row = 64 elements + 16 bytes: the 32 lanes of a store hit 32 banks.
// Chosen rows (embedding), and shapes whose columns do not lie as the output's: one thread per
// element.
//
// Numbers: one subtraction and one or two products in float32, never contracted; exact contract.
// Compiled and host-tested (unpacking, value, layout); no GPU has run it.
#pragma once

#include "device.cuh"
#include "weights.cuh"

namespace qkern {
namespace cuda {

constexpr int kDequantizeWarps = 2;  // 34 KB of shared memory with float32 outputs

struct Output {
  void* data;
  qk_dtype dtype;
  int64_t row_stride;
};

template <int kBytes>
struct Cell;
template <>
struct Cell<2> {
  using Type = uint16_t;
};
template <>
struct Cell<4> {
  using Type = float;
};

template <int kBytes>
__device__ typename Cell<kBytes>::Type to_cell(float value, qk_dtype dtype) {
  if constexpr (kBytes == 4)
    return value;
  else
    return dtype == QK_F16 ? F16::from_float(value) : BF16::from_float(value);
}

// Rows [begin, begin + count), whole blocks; row 0 of `out` is row `begin`.
template <Order kOrder, int kBits, int kBytes>
__global__ void __launch_bounds__(kDequantizeWarps * 32)
    dequantize_blocks(const __grid_constant__ Weights w, int64_t begin, int64_t count, Output out) {
  using T = typename Cell<kBytes>::Type;
  constexpr int kStride = kBlockColumns + 16 / kBytes;
  __shared__ __align__(16) T cells[kDequantizeWarps][kTileRows * kStride];
  const Layout& l = w.layout;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t tile = begin / kTileRows + blockIdx.y;
  const int64_t k_block = (int64_t)blockIdx.x * kDequantizeWarps + warp;
  if (k_block >= l.k_blocks) return;

  Vector vectors[kBits];
  const Vector* from =
      (const Vector*)(w.packed + l.codes_offset + (tile * l.k_blocks + k_block) * l.block_bytes);
#pragma unroll
  for (int v = 0; v < kBits; ++v) vectors[v] = from[v * 32 + lane];

  T* mine = cells[warp];
  float scale[8], zero[8];
  int64_t group = -1;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t padded = k_block * kBlockColumns + 16 * j;
    const int64_t at = min(padded / l.group_padded, l.groups - 1);
    if (at != group) {
      group = at;
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int64_t row = tile * kTileRows + 8 * r + lane / 4;
        scale[r] = w.scale(row, group);
        zero[r] = w.zero(row, group);
      }
    }
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const Slot slot = {r / 2, r % 2, j, s};
        const int64_t row = tile * kTileRows + 8 * r + lane / 4;
        const float value = w.value(row < l.n ? row : 0, group,
                                    lane_code<kOrder, kBits>(vectors, slot), scale[r], zero[r]);
        mine[block_row(slot, lane) * kStride + block_column(kOrder, slot, lane)] =
            to_cell<kBytes>(value, out.dtype);
      }
  }
  __syncwarp();
  constexpr int kPerVector = 16 / kBytes, kVectors = kBlockColumns / kPerVector;
  for (int c = lane; c < kTileRows * kVectors; c += 32) {
    const int row = c / kVectors, column = c % kVectors * kPerVector;
    const int64_t out_row = tile * kTileRows + row - begin;
    const int64_t out_column = k_block * kBlockColumns + column;
    if (out_row < 0 || out_row >= count || out_column >= l.k) continue;
    T* to = (T*)out.data + out_row * out.row_stride + out_column;
    const T* cell = mine + row * kStride + column;
    if (out_column + kPerVector <= l.k && (uintptr_t)to % 16 == 0)
      *(Vector*)to = *(const Vector*)cell;
    else
      for (int e = 0; e < kPerVector && out_column + e < l.k; ++e) to[e] = cell[e];
  }
}

// Any rows, any order of columns.
__global__ void dequantize_elements(const __grid_constant__ Weights w, const int64_t* rows,
                                    int64_t begin, int64_t count, Output out) {
  const Layout& l = w.layout;
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t e = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; e < count * l.k; e += step) {
    const int64_t i = e / l.k, column = e % l.k;
    const int64_t row = rows ? rows[i] : begin + i, to = w.input_column(column);
    const bool valid = row >= 0 && row < l.n;
    if (to >= 0)
      store_number(out.data, out.dtype, i * out.row_stride + to,
                   valid ? w.at(row, column) : bits_as_float(0x7fc00000u));
  }
}

}  // namespace cuda
}  // namespace qkern
