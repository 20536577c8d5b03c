// SPDX-License-Identifier: Apache-2.0
// Few rows (up to kStreamRows): the time is that of reading the weights once, so codes go from the
// packed stream to registers to dot products, reused over the rows, without scratch. A thread's
// panels are read as kStreams contiguous streams at a time with prefetch ahead in each, which is
// what it takes to load memory fully.
#pragma once

#include "a8_output_avx512.h"
#include "a8_tile_avx512.h"

namespace qkern {
namespace {

constexpr int kStreamRows = 4;
constexpr int kStreams = 4;
constexpr int64_t kStreamAhead = 3072;  // bytes from a load to its prefetch
constexpr int64_t kStreamPiece = 512;   // columns before the next streams have their turn

// Panels whose sums are in registers at once: 8 to 16 sums hide the latency of the dot product and
// leave room for codes and activations.
template <class Codes>
constexpr int panels_together(int rows) {
  return Codes::kLanes == Lanes::kDword ? (rows <= 2 ? 4 : 2) : (rows <= 2 ? 2 : 1);
}

// Where panel s of a group of streams stands.
struct StreamAt {
  const uint8_t* codes;
  const uint8_t* tables;
};

inline __m512i load_x16(const int8_t* x) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

// A prefetch that the compiler leaves right behind the load of `loaded`. Where all prefetches of a
// step come first, as GCC orders them, one thread reads 2 to 10 % slower.
inline void prefetch_behind(__m512i& loaded, const uint8_t* at) {
  __asm__ volatile("prefetcht0 %1" : "+v"(loaded) : "m"(*at));
}

// sums[s][r][i] += products of `units` units; i: half for dword lanes, vector for row lanes.
template <class Codes, int kRows, int kPanels, int kSums>
inline void stream_units(const Codes& codes, const StreamAt* at, const int8_t* x, int64_t x_stride,
                         int64_t units, __m512i (&sums)[kPanels][kRows][kSums]) {
  constexpr int kStep = Codes::kUnitBytes * Codes::kPanelHalves;
  constexpr int kLines = kStep / 64;
  for (int64_t u = 0; u < units; ++u, x += Codes::kUnit) {
#pragma GCC unroll 8
    for (int s = 0; s < kPanels; ++s) {
      const uint8_t* unit = at[s].codes + u * kStep;
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        __m512i parts[Codes::kParts];
        constexpr bool kDword = Codes::kLanes == Lanes::kDword;
        codes.load(kDword ? unit + i * Codes::kUnitBytes : unit, i, at[s].tables, parts);
#pragma GCC unroll 4
        for (int line = i * kLines / kSums; line < (i + 1) * kLines / kSums; ++line)
          prefetch_behind(parts[0], unit + 64 * line + kStreamAhead);
#pragma GCC unroll 8
        for (int part = 0; part < Codes::kParts; ++part)
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const int8_t* from = x + r * x_stride + part * Codes::kLaneBytes;
            const __m512i x_part = kDword ? load_x4(from) : load_x16(from);
            sums[s][r][i] = dot<Codes::kLargest>(sums[s][r][i], parts[part], x_part);
          }
      }
    }
  }
}

// Row lanes hold four partial sums per output: adds them, outputs in order.
inline __m512i fold_lanes(const __m512i (&sums)[4]) {
  __m512i v[4] = {sums[0], sums[1], sums[2], sums[3]};
  transpose_dwords(v);
  return _mm512_add_epi32(_mm512_add_epi32(v[0], v[1]), _mm512_add_epi32(v[2], v[3]));
}

// acc + the chunk's sum, as the contract has it.
inline __m512 add_chunk(const LinearJob& job, int64_t at, __m512i sum, __m512 scale,
                        const __m512* negative_zero, __m512 acc) {
  __m512 t = _mm512_cvtepi32_ps(sum);
  if (negative_zero) t = _mm512_fmadd_ps(*negative_zero, _mm512_set1_ps(job.x_sum[at]), t);
  if (job.w->h.activations == QK_ACT_INT8_GROUP)
    scale = _mm512_mul_ps(scale, _mm512_set1_ps(job.q_scale[at]));
  return _mm512_fmadd_ps(t, scale, acc);
}

template <class Codes, int kRows>
struct Streams {
  static constexpr int kTogether = panels_together<Codes>(kRows);
  static constexpr int kHalves = Codes::kPanelHalves;

  const LinearJob& job;
  const Codes& codes;
  int64_t m;
  const uint8_t* panels[kStreams];
  __m512 acc[kStreams][kRows][kHalves];
  __m512i partial[kStreams][kRows][kHalves];

  // Columns [k0, k0 + columns) of a chunk of group g, panels s0 .. s0 + kTogether.
  void sum_piece(int64_t g, int64_t k0, int64_t columns, int s0, const __m512i (&start)[kRows]) {
    const Packed& w = *job.w;
    StreamAt at[kTogether];
    for (int s = 0; s < kTogether; ++s) {
      const uint8_t* block = w.group_block(panels[s0 + s], g, kHalves);
      at[s].tables = w.half_tables(panels[s0 + s], g, kHalves, 0);
      at[s].codes = w.codes_of(block) + k0 / Codes::kUnit * Codes::kUnitBytes * kHalves;
    }
    constexpr int kSums = kHalves * Codes::kHalfVectors;
    __m512i sums[kTogether][kRows][kSums];
#pragma GCC unroll 4
    for (int s = 0; s < kTogether; ++s)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kSums; ++i) sums[s][r][i] = _mm512_setzero_si512();
    stream_units(codes, at, job.q + m * job.q_stride + g * w.group_padded + k0, job.q_stride,
                 columns / Codes::kUnit, sums);
#pragma GCC unroll 4
    for (int s = 0; s < kTogether; ++s)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        __m512i* to = partial[s0 + s][r];
        if constexpr (Codes::kLanes == Lanes::kRow) {
          to[0] = _mm512_add_epi32(start[r], fold_lanes(sums[s][r]));
        } else {
          to[0] = _mm512_add_epi32(start[r], sums[s][r][0]);
          to[1] = _mm512_add_epi32(start[r], sums[s][r][1]);
        }
      }
  }

  void add_chunk_of(int64_t g, int64_t chunk) {
    const Packed& w = *job.w;
    for (int s = 0; s < kStreams; ++s) {
      const uint8_t* block = w.group_block(panels[s], g, kHalves);
      _mm_prefetch(reinterpret_cast<const char*>(w.scales_of(block, g, kHalves) + kStreamAhead),
                   _MM_HINT_T0);
      for (int half = 0; half < kHalves; ++half) {
        const __m512 scale = load_scales(w, block, g, half, kHalves);
        __m512 zero = _mm512_setzero_ps();
        if (w.zero_bytes) zero = load_negative_zeros(w, block, g, half, kHalves);
        for (int r = 0; r < kRows; ++r)
          acc[s][r][half] = add_chunk(job, (m + r) * job.chunks + chunk, partial[s][r][half], scale,
                                      w.zero_bytes ? &zero : nullptr, acc[s][r][half]);
      }
    }
  }

  void run() {
    const Packed& w = *job.w;
    for (auto& panel : acc)
      for (auto& row : panel)
        for (auto& half : row) half = _mm512_setzero_ps();
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t padded = w.group_columns_padded(g);
      for (int64_t c = 0; c * job.chunk < padded; ++c) {
        const int64_t chunk = g * job.chunks_per_group + c;
        const int64_t end = min64(padded, (c + 1) * job.chunk);
        __m512i start[kRows];
        for (int r = 0; r < kRows; ++r)
          start[r] = _mm512_set1_epi32(job.q_init[(m + r) * job.chunks + chunk]);
        for (int s = 0; s < kStreams; s += kTogether)
          sum_piece(g, c * job.chunk, end - c * job.chunk, s, start);
        add_chunk_of(g, chunk);
      }
    }
  }

  void store(const int64_t (&indices)[kStreams]) const {
    for (int s = 0; s < kStreams; ++s)
      for (int r = 0; r < kRows; ++r)
        for (int half = 0; half < kHalves; ++half)
          store_outputs(job, acc[s][r][half], m + r, (indices[s] * kHalves + half) * kHalf);
  }
};

template <class Codes, int kRows>
void stream_panels(const LinearJob& job, const Codes& codes, int64_t m,
                   const int64_t (&indices)[kStreams]) {
  Streams<Codes, kRows> streams = {job, codes, m, {}, {}, {}};
  for (int s = 0; s < kStreams; ++s) streams.panels[s] = job.w->panel(indices[s]);
  streams.run();
  streams.store(indices);
}

}  // namespace
}  // namespace qkern
