// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, all of it but the bytes of a format.
//
// Codes of a piece (both halves of a panel, at most kPiece columns) become bytes in a scratch of
// the first cache, [half][4 columns][16 outputs][4], once for all rows of the block. A tile then
// multiplies rows x 16 outputs: a weight register holds 4 columns of 8 outputs, an activation
// register 4 columns of one row in every dword. Sums of a chunk are exact int32, so that their
// order is free; scales are applied per chunk, in ascending order (half_avx2.h).
//
//   narrow values (codes below 64): vpmaddubsw of u8 values and s8 activations; as many results as
//     fit are added in int16 (8 for 4 bits: 8 * 2 * 15 * 127 = 30480), then vpmaddwd, vpaddd. Sums
//     start at -offset * sum(q), which the job holds.
//   wide values (-128..127): a pair of 255 * 127 would saturate, so vpmaddubsw takes |v| and
//     vpsignb(q, v): 2 * 128 * 127 = 32512 fits, every product is exact; then vpmaddwd, vpaddd.
#pragma once

#include "walk_avx2.h"

namespace qkern {
namespace {

constexpr int64_t kPiece = 256;                 // columns: 4 KiB of bytes per half
constexpr int64_t kHalfBytes = kPiece * kHalf;  // of scratch
constexpr int64_t kStepBytes = 4 * kHalf;       // of scratch: 4 columns of a half
constexpr int kWide = 0;

// vpmaddubsw results of codes of `bits` bits that may be added in int16.
constexpr int narrow_run(int bits) { return 32767 / (2 * ((1 << bits) - 1) * 127); }

inline __m256i broadcast_step(const int8_t* q) {
  int32_t four;
  memcpy(&four, q, 4);
  return _mm256_set1_epi32(four);
}

inline void add_to(int32_t* sums, __m256i v) { store256(sums, _mm256_add_epi32(load256(sums), v)); }

template <int kRun, int kRows>
inline void add_narrow(const uint8_t* values, int64_t steps, const int8_t* q, int64_t q_stride,
                       int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t begin = 0; begin < steps; begin += kRun) {
    const int64_t end = min64(steps, begin + kRun);
    __m256i acc[kRows][2];
    for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    for (int64_t s = begin; s < end; ++s) {
      const __m256i w0 = load256(values + s * kStepBytes);
      const __m256i w1 = load256(values + s * kStepBytes + 32);
      for (int r = 0; r < kRows; ++r) {
        const __m256i x = broadcast_step(q + r * q_stride + 4 * s);
        acc[r][0] = _mm256_add_epi16(acc[r][0], _mm256_maddubs_epi16(w0, x));
        acc[r][1] = _mm256_add_epi16(acc[r][1], _mm256_maddubs_epi16(w1, x));
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v)
        add_to(sums + r * kHalf + 8 * v, _mm256_madd_epi16(acc[r][v], ones));
  }
}

template <int kRows>
inline void add_wide(const uint8_t* values, int64_t steps, const int8_t* q, int64_t q_stride,
                     int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i acc[kRows][2];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) acc[r][v] = load256(sums + r * kHalf + 8 * v);
  for (int64_t s = 0; s < steps; ++s) {
    const __m256i w0 = load256(values + s * kStepBytes);
    const __m256i w1 = load256(values + s * kStepBytes + 32);
    const __m256i abs0 = _mm256_abs_epi8(w0), abs1 = _mm256_abs_epi8(w1);
    for (int r = 0; r < kRows; ++r) {
      const __m256i x = broadcast_step(q + r * q_stride + 4 * s);
      const __m256i p0 = _mm256_maddubs_epi16(abs0, _mm256_sign_epi8(x, w0));
      const __m256i p1 = _mm256_maddubs_epi16(abs1, _mm256_sign_epi8(x, w1));
      acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(p0, ones));
      acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(p1, ones));
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) store256(sums + r * kHalf + 8 * v, acc[r][v]);
}

template <int kRun, int kRows>
inline void add_tile(const uint8_t* values, int64_t steps, const int8_t* q, int64_t q_stride,
                     int32_t* sums) {
  if constexpr (kRun == kWide)
    add_wide<kRows>(values, steps, q, q_stride, sums);
  else
    add_narrow<kRun, kRows>(values, steps, q, q_stride, sums);
}

// All rows of a block times one half of a piece.
template <int kRun>
inline void add_rows(const uint8_t* values, int64_t steps, const int8_t* q, int64_t q_stride,
                     int rows, int32_t* sums) {
  int i = 0;
  for (; i + 4 <= rows; i += 4)
    add_tile<kRun, 4>(values, steps, q + i * q_stride, q_stride, sums + i * kHalf);
  q += i * q_stride;
  sums += i * kHalf;
  if (rows - i == 3) add_tile<kRun, 3>(values, steps, q, q_stride, sums);
  if (rows - i == 2) add_tile<kRun, 2>(values, steps, q, q_stride, sums);
  if (rows - i == 1) add_tile<kRun, 1>(values, steps, q, q_stride, sums);
}

// Where the sum of a chunk starts, so that it ends as the integer of the contract.
template <int kRun>
inline int32_t sum_start(const LinearJob& job, int64_t at) {
  if constexpr (kRun != kWide) return job.q_init[at];
  // Values are code - 128: with zeros the contract sums the codes themselves. X is exact here.
  return job.x_sum ? 128 * (int32_t)job.x_sum[at] : 0;
}

template <int kRun>
inline void start_chunk(const Block& b, int64_t chunk, int32_t* sums) {
  for (int h = 0; h < b.half_count(); ++h)
    for (int i = 0; i < b.rows; ++i, sums += kHalf) {
      const int64_t at = (b.m + i) * b.job.chunks + chunk;
      const __m256i start = _mm256_set1_epi32(sum_start<kRun>(b.job, at));
      store256(sums, start);
      store256(sums + 8, start);
    }
}

inline void end_chunk(const Block& b, int64_t g, int64_t chunk, const int32_t* sums, float* acc) {
  const LinearJob& job = b.job;
  const bool grouped = job.w->h.activations == QK_ACT_INT8_GROUP;
  for (int s = 0; s < b.streams; ++s)
    for (int half = 0; half < b.halves(s); ++half) {
      const GroupScales scales = scales_at(b, s, g, half);
      for (int i = 0; i < b.rows; ++i, sums += kHalf, acc += kHalf) {
        const int64_t at = (b.m + i) * job.chunks + chunk;
        const Half sum = {
            {_mm256_cvtepi32_ps(load256(sums)), _mm256_cvtepi32_ps(load256(sums + 8))}};
        add_chunk(scales, sum, scales.asymmetric ? job.x_sum[at] : 0.f,
                  grouped ? job.q_scale[at] : 1.f, acc);
      }
    }
}

// Format: kRun and unpack(piece, values), which fills values + half * kHalfBytes for each half.
template <class Format>
inline void compute_int8(const Block& b) {
  const LinearJob& job = b.job;
  const Packed& w = *job.w;
  alignas(64) uint8_t values[2 * kHalfBytes];
  alignas(64) int32_t sums[2 * kRowBlock * kHalf];
  alignas(64) float acc[2 * kRowBlock * kHalf];
  memset(acc, 0, sizeof(float) * (size_t)(b.half_count() * b.rows * kHalf));
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t c = 0; c * job.chunk < padded; ++c) {
      const int64_t chunk = g * job.chunks_per_group + c;
      const int64_t end = min64(padded, (c + 1) * job.chunk);
      start_chunk<Format::kRun>(b, chunk, sums);
      for (int64_t k = c * job.chunk; k < end; k += kPiece)
        for (int s = 0; s < b.streams; ++s) {
          const Piece p = piece_at(b, s, g, k, min64(kPiece, end - k));
          Format::unpack(p, values);
          const int8_t* q = job.q + b.m * job.q_stride + g * w.group_padded + k;
          for (int half = 0; half < p.halves; ++half)
            add_rows<Format::kRun>(values + half * kHalfBytes, p.columns / 4, q, job.q_stride,
                                   b.rows, sums + (s * w.panel_halves + half) * b.rows * kHalf);
        }
      end_chunk(b, g, chunk, sums, acc);
    }
  }
  finish_block(b, acc);
}

template <class Format>
inline void linear_int8(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  walk(job, m0, m1, p0, p1, kRowBlock, [](const Block& b) { compute_int8<Format>(b); });
}

// ---- formats ----

inline uint8_t* step_at(uint8_t* values, int half, int64_t step, int v) {
  return values + half * kHalfBytes + step * kStepBytes + 32 * v;
}

inline __m256i signed_bytes(__m256i v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }

inline __m256i load_table(const uint8_t* table) {
  return signed_bytes(_mm256_broadcastsi128_si256(load128(table)));
}

template <int kBits>
struct Int8Int {
  static constexpr int kRun = kBits == 8 ? kWide : narrow_run(kBits);

  static void unpack(const Piece& p, uint8_t* values) {
    for_dword_codes<kBits>(p, [&](int half, int64_t step, int v, __m256i codes) {
      store256(step_at(values, half, step, v), kRun == kWide ? signed_bytes(codes) : codes);
    });
  }
};

// One table of at most 16 entries for the whole tensor.
template <int kBits>
struct Int8Table {
  static constexpr int kRun = kWide;

  static void unpack(const Piece& p, uint8_t* values) {
    const __m256i table = load_table(p.tables);
    for_dword_codes<kBits>(p, [&](int half, int64_t step, int v, __m256i codes) {
      store256(step_at(values, half, step, v), _mm256_shuffle_epi8(table, codes));
    });
  }
};

// A table per row: a 16-byte lane is a row, looked up in its own table, then turned to dword lanes.
template <int kBits>
struct Int8RowTable {
  static constexpr int kRun = kWide;

  static void unpack(const Piece& p, uint8_t* values) {
    constexpr int kSteps = kUnitSteps<kBits>;
    for (int v = 0; v < 2; ++v) {
      __m256i tables[4];
      for (int c = 0; c < 4; ++c) tables[c] = signed_bytes(load256(p.tables + 64 * c + 32 * v));
      const uint8_t* at = p.codes + 32 * v;
      for (int64_t step = 0; step < p.columns / 4; step += 4 * kSteps, at += kRowUnitBytes<kBits>) {
        if (v == 0) prefetch_ahead(at, kRowUnitBytes<kBits>);
        for (int s = 0; s < kSteps; ++s) {
          __m256i rows[4], dwords[4];
          for (int c = 0; c < 4; ++c)
            rows[c] = _mm256_shuffle_epi8(tables[c], unit_codes<kBits, 256>(at + 64 * c, s));
          transpose_dwords(rows, dwords);
          for (int d = 0; d < 4; ++d) store256(step_at(values, 0, step + 4 * s + d, v), dwords[d]);
        }
      }
    }
  }
};

}  // namespace
}  // namespace qkern
