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
// A table per group or tile comes with its stage, and is loaded into registers before the block.
// After the loop the warps along K add their results in ascending order through shared memory.
//
// Numbers. Codes minus 2^(b-1) and activations are exact in the operands. The matrix unit sums in
// float32 (int32) within a group; scales, zeros and table_scale are float32. With zeros the sum of
// activations is a product with ones. Tables are rounded to the type of the activations after
// division by a power of two (convert_tables.cuh). int8 with one scale per row, symmetric or with a
// table per tensor or row, K <= 65536: sums are exact integers over all of K and the result has the
// bits of the CPU kernels. All other
// results differ from the CPU's by the order of float32 additions only (and tables by rounding).
// Nothing depends on M inside a family of schedule.h; there are no atomics and no locks.
//
// Mixture of experts (experts.cuh): a token tile belongs to one expert, whose weight it reads.
//
// Register budget (per thread): fragments 4: 64 results + 64 sums + 8 activations + converter
// (Table of 4 bits: 64 for eight rows) + addresses; tools/compile_check.py fails on any spill.
//
// What a Hopper card has besides (wgmma, bulk copies, clusters, dependent launches) is left for a
// family of its own over the same layout and converters, until there is a card to run it: barriers
// and asynchronous copies of that kind cannot be checked by reading. So there is no bulk copy here,
// on any architecture, and tools/compile_check.py asks for cp.async of 16 bytes in its place.
//
// Compiled and host-tested (layout, converters, schedules, and this source itself on an emulated
// device: host_test/). No GPU has run it.
#pragma once

#include "linear_params.cuh"

namespace qkern {
namespace cuda {

// A place in the sequence of segments (scale groups): `rest` steps of `segment` are over.
struct Progress {
  int segment, rest;
  // Moves by whole segments and `steps` more, fewer than a segment.
  __device__ __forceinline__ void advance(int segments, int steps, int segment_steps) {
    segment += segments;
    rest += steps;
    if (rest >= segment_steps) {
      rest -= segment_steps;
      ++segment;
    }
  }
};

// Brings one stage after the other into the ring. Addresses advance; nothing is multiplied or
// divided per stage.
template <class C, int kShape>
struct Copier {
  using D = Chassis<C, kShape>;
  static constexpr Shape kS = D::kS;
  static constexpr int kElement = C::kBytes ? 1 : 2;
  static constexpr int kRowStep = kS.threads() / D::kPieces;
  static constexpr int kRowCodes = kS.stage_blocks() * D::kBlockBytes / 16;  // pieces per row tile

  const LinearParams& p;
  const int thread;
  const int scale_size, zero_size;  // bytes per number, 0: none
  const uint8_t* codes;             // this stage's, of the first row tile
  const uint8_t* x;                 // what this thread copies of its first token
  int64_t codes_row;                // bytes from row tile to row tile
  int64_t x_row;                    // bytes from one of the thread's tokens to the next
  int blocks_left, columns_left, tokens_left, tiles_left;
  const uint8_t *scales, *zeros, *tables;  // of the first row tile
  Progress at;                             // first group of this stage

  __device__ __forceinline__ Copier(const LinearParams& params, const Share& share, int thread_,
                                    int64_t first_tile, int first_stage, int scale_size_,
                                    int zero_size_)
      : p(params), thread(thread_), scale_size(scale_size_), zero_size(zero_size_) {
    const int first_block = first_stage * kS.stage_blocks();
    codes_row = p.k_blocks * D::kBlockBytes;
    // With one row tile the rest of an address is known when this is compiled.
    codes = p.codes + share.weight(p) + first_tile * codes_row +
            (int64_t)first_block * D::kBlockBytes + (kS.warps_rows == 1 ? thread * 16 : 0);
    x_row = kRowStep * p.x_stride * kElement;
    const int64_t column =
        (int64_t)first_block * kBlockColumns + thread % D::kPieces * (16 / kElement);
    x = (const uint8_t*)p.x +
        ((share.first_token + thread / D::kPieces) * p.x_stride + column) * kElement;
    blocks_left = (int)p.k_blocks - first_block;
    columns_left = (int)(p.x_columns - column);
    tokens_left = share.tokens - thread / D::kPieces;
    tiles_left = (int)min(p.row_tiles - first_tile, (int64_t)kS.warps_rows);
    at = {0, 0};
    if (p.stage_groups) {
      const int step = first_block * D::kSteps;
      at = {step / p.segment_steps, step % p.segment_steps};
    }
    scales = p.scales + share.weight(p) + first_tile * p.groups * kTileRows * scale_size;
    zeros = p.zeros + share.weight(p) + first_tile * p.groups * kTileRows * zero_size;
    tables = p.tables + share.weight(p) + first_tile * p.groups * p.table_bytes;
  }

  // What belongs to the groups of one stage, row tile after row tile: `pieces` per group, a power
  // of two.
  __device__ __forceinline__ void copy_groups(uint32_t to, const uint8_t* from, int pieces) const {
    const int row_pieces = p.stage_groups * pieces;
    const int64_t row_bytes = (int64_t)p.groups * pieces * 16;
    from += (int64_t)at.segment * pieces * 16;
#pragma unroll 1
    for (int row = 0; row < kS.warps_rows; ++row, from += row_bytes)
#pragma unroll 1
      for (int c = thread; c < row_pieces; c += kS.threads()) {
        const bool valid = row < tiles_left && c < (p.groups - at.segment) * pieces;
        copy_async(to + (row * row_pieces + c) * 16, from + c * 16, valid);
      }
  }

  __device__ __forceinline__ void copy(uint32_t slot) {
    const int have = min(blocks_left, kS.stage_blocks()) * (D::kBlockBytes / 16);
    // Not unrolled where registers are short: every copy would keep its own addresses.
#pragma unroll(D::kFragments == 4 && kS.warps_rows > 1 ? 1 : D::kCodeBytes / 16)
    for (int c0 = 0; c0 < kS.warps_rows * kRowCodes; c0 += kS.threads()) {
      const int c = c0 + thread;
      const int row = kS.warps_rows == 1 ? 0 : c / kRowCodes;
      const int piece = c - row * kRowCodes;
      const bool valid = piece < have && row < tiles_left;
      if (kS.warps_rows * kRowCodes % kS.threads() == 0 || c < kS.warps_rows * kRowCodes)
        copy_async(slot + c * 16,
                   kS.warps_rows == 1 ? codes + c0 * 16 : codes + row * codes_row + piece * 16,
                   valid);
    }
    const int first_row = thread / D::kPieces, piece = thread % D::kPieces;
    const uint8_t* from = x;
#pragma unroll(D::kFragments == 4 ? 1 : kS.tokens() / kRowStep)
    for (int r = 0; r < kS.tokens(); r += kRowStep, from += x_row)
      copy_async(slot + D::kCodeBytes +
                     ((r + first_row) * D::kPieces + (piece ^ ((r + first_row) & 7))) * 16,
                 from, r < tokens_left && columns_left > 0);
    if (p.stage_groups) {
      const int groups = kS.warps_rows * p.stage_groups;
      uint32_t to = slot + D::kStageBytes;
      if (scale_size) copy_groups(to, scales, kTileRows / 16 * scale_size);
      to += groups * kTileRows * scale_size;
      if (zero_size) copy_groups(to, zeros, kTileRows / 16 * zero_size);
      to += groups * kTileRows * zero_size;
      if constexpr (C::kTables == Tables::kBlocks) copy_groups(to, tables, p.table_bytes / 16);
      at.advance(p.stage_segments, p.stage_rest, p.segment_steps);
    }
    codes += kS.stage_blocks() * D::kBlockBytes;
    x += kS.stage_columns() * kElement;
    blocks_left -= kS.stage_blocks();
    columns_left -= kS.stage_columns();
  }
};

// What a lane holds of tables; nothing where a converter has none in registers.
template <class C, bool kInRegisters>
struct RegistersOf {
  using Type = int;
};
template <class C>
struct RegistersOf<C, true> {
  using Type = typename C::Registers;
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
  const Share share = share_of(p, tile.token_tile, kS.tokens());
  const int64_t first_token = share.first_token;
  if (share.tokens <= 0) return;  // more tiles than the experts need
  const int split = gridDim.y;
  const int stage_begin = (int)split_begin(p.stages, split, blockIdx.y);
  const int stage_end = (int)split_begin(p.stages, split, blockIdx.y + 1);
  const int k_blocks = (int)p.k_blocks;

  const bool zeros = D::kZeros && p.zeros;
  const int scale_size = p.scales ? (p.scale_dtype == QK_F32 ? 4 : 2) : 0;
  const int zero_size = zeros ? (p.zero_dtype == QK_F32 ? 4 : 2) : 0;
  const int groups_bytes =  // of scales and zeros
      kS.warps_rows * p.stage_groups * kTileRows * (scale_size + zero_size);
  const int slot_bytes =
      D::kStageBytes + groups_bytes +
      (C::kTables == Tables::kBlocks ? kS.warps_rows * p.stage_groups * p.table_bytes : 0);

  Copier<C, kShape> copier(p, share, thread, first_tile, stage_begin, scale_size, zero_size);
  const uint32_t ring_begin = shared_address(ring);
  const uint32_t ring_end = ring_begin + D::kStages * slot_bytes;
  uint32_t write_slot = ring_begin;
  int stages_to_copy = stage_end - stage_begin;
  const auto copy_next = [&] {
    if (stages_to_copy > 0) {
      copier.copy(write_slot);
      write_slot += slot_bytes;
      if (write_slot == ring_end) write_slot = ring_begin;
      --stages_to_copy;
    }
    commit_copies();
  };
#pragma unroll 1
  for (int s = 0; s < D::kStages - 1; ++s) copy_next();

  // ---- tables, while the first stages arrive ----
  [[maybe_unused]] const float* const table =
      (const float*)((const uint8_t*)p.table + share.weight(p));
  [[maybe_unused]] float* const factors =  // powers of two by which rows are multiplied at the end
      (float*)(shared + D::table_bytes() -
               (C::kTables == Tables::kPairs ? 128
                : D::kFactors                ? D::kRows * 4
                                             : 0));
  constexpr bool kInRegisters = C::kTables == Tables::kRows || C::kTables == Tables::kBlocks;
  using Registers = typename RegistersOf<C, kInRegisters>::Type;
  [[maybe_unused]] Registers tables[kInRegisters ? 8 : 1];
  if constexpr (C::kTables == Tables::kPairs) {
    uint16_t* const entries = (uint16_t*)(factors + 4);
    if (thread == 0) factors[0] = round_table<typename C::Type>(table, 16, false, entries);
    __syncthreads();
    for (int v = thread; v < C::kTableWords / 4; v += kS.threads()) {
      const int entry = v / 8;
      const uint32_t pair = entries[entry & 15] | (uint32_t)entries[entry >> 4] << 16;
      ((Vector*)shared)[v] = {{pair, pair, pair, pair}};
    }
    __syncthreads();
  }
  if constexpr (C::kTables == Tables::kRows) {
    for (int row = thread; row < D::kRows; row += kS.threads()) {
      float entries[1 << C::kBits];
      uint16_t rounded[1 << C::kBits];
      const int64_t from = min(first_tile * kTileRows + row, p.n - 1);
#pragma unroll
      for (int e = 0; e < 1 << C::kBits; ++e)
        entries[e] = p.table ? table[from * p.table_stride + e] : (float)e - p.center;
      const float factor = round_table<typename C::Type>(entries, 1 << C::kBits, !p.table, rounded);
      if constexpr (D::kFactors) factors[row] = factor;
      ((Registers*)shared)[row] = make_row_table<Registers>(rounded);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 8; ++r)
      tables[r] = ((const Registers*)shared)[warp_row * kTileRows + 8 * r + lane / 4];
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
          const int token = (warp_token * kN + n) * 8 + 2 * (lane % 4) + e;
          x_scale[n][e] = p.x_groups > 1 && token < share.tokens
                              ? mul_rn(p.x_scales[(first_token + token) * p.x_groups + segment],
                                       share.table_scale(p))
                              : 1.f;
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
  // With int8 it belongs to the scale of x, and there are no registers to keep it.
  [[maybe_unused]] const float table_scale = C::kBytes ? 1.f : share.table_scale(p);
  // Zeros count from 2^(bits-1) where the operand does (not with int8: there the sums are moved).
  const auto add_group = [&](const uint8_t* scale_from, const uint8_t* zero_from, int segment) {
    float scale[8] = {1, 1, 1, 1, 1, 1, 1, 1}, zero[8] = {};
    if (p.scales) load_eight(scale_from, p.scale_dtype, scale);
    if (zeros) load_eight(zero_from, p.zero_dtype, zero);
    if constexpr (!C::kBytes) {
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        scale[r] = mul_rn(scale[r], table_scale);
        zero[r] = sub_rn(zero[r], p.center);
      }
    }
    add_segment(scale, zero, segment);
  };
  const int64_t only_row =  // of this lane's scales where a row has one
      min(first_tile + warp_row, p.row_tiles - 1) * kTileRows + 8 * (lane / 4);
  const uint8_t* const only_scale = p.scales + share.weight(p) + only_row * scale_size;
  const uint8_t* const only_zero = p.zeros + share.weight(p) + only_row * zero_size;

  const int x_lane_row = (warp_token * kN + (kN > 1 ? lane / 16 : 0)) * 8 + lane % 8;
  const int x_lane_piece = (lane / 8 % 2) ^ (lane % 8);
  const auto multiply = [&](Sum* d, const uint32_t* a, const uint32_t* b) {
    if constexpr (C::kBytes)
      mma(S8{}, d, a, b);
    else
      mma(typename C::Type{}, d, a, b);
  };
  // One step of the matrix unit: `words` is the lane's part of a block, `x_row` the address of its
  // row of activations, `first_piece` the block's first piece in the row modulo 8.
  const auto do_step = [&](const Vector* words, uint32_t x_row, int first_piece, int step) {
    const auto w = C::load(words, step);
    uint32_t x[kN][2];
    const uint32_t from = x_row + ((first_piece + 2 * step) ^ x_lane_piece) * 16;
    if constexpr (kN == 1) {
      ldmatrix_x2(x[0], from);
    } else {
#pragma unroll
      for (int n = 0; n < kN; n += 2) ldmatrix_x4(x[n], from + n * 8 * D::kPieces * 16);
    }
    if (zeros) {
      constexpr uint32_t kOnes = D::ones();
      const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
      for (int n = 0; n < kN; ++n) multiply(x_sums[n], ones, x[n]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
      if constexpr (C::kTables == Tables::kPairs)
        C::fragment(w.tile[i], shared, lane, a);
      else if constexpr (kInRegisters)
        C::fragment(w.tile[i], step, tables + 2 * i, a);
      else
        C::fragment(w.tile[i], step, a);
#pragma unroll
      for (int n = 0; n < kN; ++n) multiply(sums[i][n], a, x[n]);
    }
  };

  Progress stage_at = {0, 0}, warp_at = {0, 0};
  if (p.segment_steps) {
    const int step = stage_begin * kS.stage_blocks() * D::kSteps;
    const int warp_step = step + warp_k * kS.warp_blocks * D::kSteps;
    stage_at = {step / p.segment_steps, step % p.segment_steps};
    warp_at = {warp_step / p.segment_steps, warp_step % p.segment_steps};
  }
  uint32_t read_offset = 0;
  int blocks_left = min(k_blocks, stage_end * kS.stage_blocks()) - stage_begin * kS.stage_blocks();
  for (; blocks_left > 0; blocks_left -= kS.stage_blocks()) {
    wait_copies<D::kStages - 2>();
    __syncthreads();
    copy_next();

    const uint8_t* const slot = ring + read_offset;
    read_offset += slot_bytes;
    if (read_offset == (uint32_t)(D::kStages * slot_bytes)) read_offset = 0;
    Progress block_at = warp_at;
#pragma unroll 1
    for (int b = 0; b < kS.warp_blocks; ++b) {
      const int in_stage = warp_k * kS.warp_blocks + b;
      if (in_stage >= blocks_left) break;
      const Vector* const words =
          (const Vector*)(slot + (warp_row * kS.stage_blocks() + in_stage) * D::kBlockBytes) + lane;
      const uint32_t x_row = shared_address(slot + D::kCodeBytes) +
                             (x_lane_row * D::kPieces + in_stage * D::kBlockPieces / 8 * 8) * 16;
      const int first_piece = in_stage * D::kBlockPieces % 8;
      const int first_group = warp_row * p.stage_groups + block_at.segment - stage_at.segment;
      if constexpr (C::kTables == Tables::kBlocks)
        load_tables(slot + D::kStageBytes + groups_bytes + first_group * p.table_bytes, lane / 4,
                    p.shared_tables, tables);
      // Steps up to the end of the block or of the scale group, whichever comes first.
      const bool last = kS.warps_k > 1 || in_stage + 1 == blocks_left;
      for (int step = 0; step < D::kSteps;) {
        const int left = p.segment_steps ? p.segment_steps - block_at.rest : D::kSteps;
        const int run = min(D::kSteps - step, left);
        if (run == D::kSteps && !(kInRegisters && kN == 4)) {  // tables leave no registers to spare
#pragma unroll
          for (int s = 0; s < D::kSteps; ++s) do_step(words, x_row, first_piece, s);
        } else {
#pragma unroll 1
          for (int s = step; s < step + run; ++s) do_step(words, x_row, first_piece, s);
        }
        step += run;
        if (!p.segment_steps) continue;
        block_at.rest += run;
        if (run == left || (last && step == D::kSteps)) {
          if (p.segment_sums && block_at.segment < p.segments) {
            const int at =
                (warp_row * p.stage_groups + block_at.segment - stage_at.segment) * kTileRows +
                lane / 4 * 8;
            const uint8_t* const scales = slot + D::kStageBytes;
            const uint8_t* const zero_from =
                scales + kS.warps_rows * p.stage_groups * kTileRows * scale_size + at * zero_size;
            add_group(p.stage_groups ? scales + at * scale_size : only_scale,
                      p.stage_groups ? zero_from : only_zero, block_at.segment);
          }
          if (run == left) block_at = {block_at.segment + 1, 0};
        }
      }
    }
    if (p.segment_steps) {
      stage_at.advance(p.stage_segments, p.stage_rest, p.segment_steps);
      warp_at.advance(p.stage_segments, p.stage_rest, p.segment_steps);
    }
  }
  if (!p.segment_sums && !p.exact) add_group(only_scale, only_zero, 0);

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
    if (in_token >= share.tokens || row >= p.row_tiles * kTileRows) continue;
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
      if constexpr (D::kFactors)
        total[r] = __float_as_uint(mul_rn(__uint_as_float(total[r]),
                                          factors[C::kTables == Tables::kPairs ? 0 : in_row + r]));
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
        const float low = finish<C::kBytes>(p, share, total[2 * v], token, row + 2 * v, shift);
        const float high =
            finish<C::kBytes>(p, share, total[2 * v + 1], token, row + 2 * v + 1, shift);
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
                       finish<C::kBytes>(p, share, total[r], token, row + r, shift));
    }
  }
}

}  // namespace cuda
}  // namespace qkern
