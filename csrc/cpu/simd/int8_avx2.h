// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, all of it but the bytes of a format.
//
// The codes of a piece (both halves of a panel, at most kPiece columns) become u8 values in a
// scratch of the first cache, once for all rows of the block. A tile then multiplies rows x 16
// outputs: in every dword of a weight register lie columns of one output, in every dword of an
// activation register the same columns of one row. Sums of a chunk are exact int32, so that their
// order is free; they start at -offset * sum(q), which the job holds. Scales are applied per chunk,
// in ascending order (half_avx2.h).
//
//   narrow values (codes below 64): 4 columns in a dword, vpmaddubsw; as many results as fit are
//     added in int16 (8 for 4 bits: 8 * 2 * 15 * 127 = 30480), then vpmaddwd, vpaddd.
//   wide values (0..255): a pair of 255 * 127 would saturate in vpmaddubsw. Values and activations
//     are widened to int16, in pairs of columns (0, 2) and (1, 3) of each four; vpmaddwd, vpaddd.
//     Tried and lost: vpmaddubsw of |v| and vpsignb(q, v), exact too, but one more instruction for
//     the two ports that multiply (125 instead of 148 GOPS a thread at M = 64 on Zen 4).
#pragma once

#include "walk_avx2.h"

namespace qkern {
namespace {

constexpr int64_t kPiece = 128;                              // columns that are unpacked at a time
constexpr int64_t kStepBytes = 4 * kHalf;                    // u8 values of 4 columns of a half
constexpr int64_t kHalfBytes = kPiece / 4 * kStepBytes * 2;  // scratch of a half, wide
constexpr int64_t kWideStride = 2 * kPiece + 64;  // bytes of a row of widened activations
constexpr int kWide = 0;

// Accumulators in their own vector types: as __m256i, each of them would live in two registers of
// gcc 12, one of either type, with a copy in every step.
using Words = unsigned short __attribute__((vector_size(32)));
using Dwords = unsigned __attribute__((vector_size(32)));

// vpmaddubsw results of codes of `bits` bits that may be added in int16.
constexpr int narrow_run(int bits) { return 32767 / (2 * ((1 << bits) - 1) * 127); }

inline __m256i broadcast_dword(const void* at) {
  int32_t dword;
  memcpy(&dword, at, 4);
  return _mm256_set1_epi32(dword);
}

template <int kRun, int kRows>
inline void add_narrow(const uint8_t* values, int64_t steps, const int8_t* q, int64_t q_stride,
                       int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  while (steps > 0) {
    Words acc[2 * kRows];
    repeat<2 * kRows>([&](int i) { acc[i] = Words{}; });
    const uint8_t* end = values + min64(steps, kRun) * kStepBytes;
    for (; values < end; values += kStepBytes, q += 4) {
      const __m256i w0 = load256(values), w1 = load256(values + 32);
      repeat<kRows>([&](int r) {
        const __m256i x = broadcast_dword(q + r * q_stride);
        acc[2 * r] += (Words)_mm256_maddubs_epi16(w0, x);
        acc[2 * r + 1] += (Words)_mm256_maddubs_epi16(w1, x);
      });
    }
    repeat<2 * kRows>([&](int i) {
      const __m256i sum = _mm256_madd_epi16((__m256i)acc[i], ones);
      store256(sums + 8 * i, _mm256_add_epi32(load256(sums + 8 * i), sum));
    });
    steps -= kRun;
  }
}

// Pairs of columns (0, 2) and (1, 3) of each four as int16, in this order.
inline void widen_rows(const int8_t* q, int64_t q_stride, int rows, int64_t columns,
                       int16_t* wide) {
  const __m128i pairs = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  for (int r = 0; r < rows; ++r)
    for (int64_t k = 0; k < columns; k += 16)  // reads into the padding of a row, writes into ours
      store256(wide + r * (kWideStride / 2) + k,
               _mm256_cvtepi8_epi16(_mm_shuffle_epi8(load128(q + r * q_stride + k), pairs)));
}

template <int kRows>
inline void add_wide(const uint8_t* values, int64_t pairs, const int16_t* x, int32_t* sums) {
  Dwords acc[2 * kRows];
  repeat<2 * kRows>([&](int i) { acc[i] = (Dwords)load256(sums + 8 * i); });
  for (int64_t p = 0; p < pairs; ++p, values += kStepBytes, x += 2) {
    const __m256i w0 = load256(values), w1 = load256(values + 32);
    repeat<kRows>([&](int r) {
      const __m256i pair = broadcast_dword(x + r * (kWideStride / 2));
      acc[2 * r] += (Dwords)_mm256_madd_epi16(w0, pair);
      acc[2 * r + 1] += (Dwords)_mm256_madd_epi16(w1, pair);
    });
  }
  repeat<2 * kRows>([&](int i) { store256(sums + 8 * i, (__m256i)acc[i]); });
}

// Where a kernel finds the activations of a piece: q, or what widen_rows made of it.
struct Activations {
  const int8_t* q;
  int64_t q_stride;
  const int16_t* wide;
};

template <int kRun, int kRows>
inline void add_tile(const uint8_t* values, int64_t steps, const Activations& x, int row,
                     int32_t* sums) {
  if constexpr (kRun == kWide)
    add_wide<kRows>(values, 2 * steps, x.wide + row * (kWideStride / 2), sums + row * kHalf);
  else
    add_narrow<kRun, kRows>(values, steps, x.q + row * x.q_stride, x.q_stride, sums + row * kHalf);
}

// All rows of a block times one half of a piece.
template <int kRun>
inline void add_rows(const uint8_t* values, int64_t steps, const Activations& x, int rows,
                     int32_t* sums) {
  int i = 0;
  for (; i + 4 <= rows; i += 4) add_tile<kRun, 4>(values, steps, x, i, sums);
  if (rows - i == 3) add_tile<kRun, 3>(values, steps, x, i, sums);
  if (rows - i == 2) add_tile<kRun, 2>(values, steps, x, i, sums);
  if (rows - i == 1) add_tile<kRun, 1>(values, steps, x, i, sums);
}

inline void start_chunk(const Block& b, int64_t chunk, int32_t* sums) {
  for (int h = 0; h < b.half_count(); ++h)
    for (int i = 0; i < b.rows; ++i, sums += kHalf) {
      const __m256i start = _mm256_set1_epi32(b.job.q_init[(b.m + i) * b.job.chunks + chunk]);
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
  constexpr bool kWidened = Format::kRun == kWide;
  const LinearJob& job = b.job;
  const Packed& w = *job.w;
  alignas(64) uint8_t values[2 * kHalfBytes];
  alignas(64) int16_t wide[kWidened ? kRowBlock * kWideStride / 2 : 1];
  alignas(64) int32_t sums[2 * kRowBlock * kHalf];
  alignas(64) float acc[2 * kRowBlock * kHalf];
  memset(acc, 0, sizeof(float) * (size_t)(b.half_count() * b.rows * kHalf));
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t c = 0; c * job.chunk < padded; ++c) {
      const int64_t chunk = g * job.chunks_per_group + c;
      const int64_t end = min64(padded, (c + 1) * job.chunk);
      start_chunk(b, chunk, sums);
      for (int64_t k = c * job.chunk; k < end; k += kPiece) {
        const int64_t columns = min64(kPiece, end - k);
        const Activations x = {job.q + b.m * job.q_stride + g * w.group_padded + k, job.q_stride,
                               wide};
        if constexpr (kWidened) widen_rows(x.q, x.q_stride, b.rows, columns, wide);
        for (int s = 0; s < b.streams; ++s) {
          const Piece p = piece_at(b, s, g, k, columns);
          Format::unpack(p, values);
          for (int half = 0; half < p.halves; ++half)
            add_rows<Format::kRun>(values + half * kHalfBytes, columns / 4, x, b.rows,
                                   sums + (s * w.panel_halves + half) * b.rows * kHalf);
        }
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

// Stores the values of 4 columns of eight outputs.
template <int kRun>
inline void store_values(uint8_t* values, int half, int64_t step, int v, __m256i bytes) {
  uint8_t* at = values + half * kHalfBytes + 32 * v;
  if constexpr (kRun == kWide) {
    store256(at + 2 * step * kStepBytes, _mm256_and_si256(bytes, _mm256_set1_epi16(0xff)));
    store256(at + (2 * step + 1) * kStepBytes, _mm256_srli_epi16(bytes, 8));
  } else {
    store256(at + step * kStepBytes, bytes);
  }
}

template <int kBits>
struct Int8Int {
  static constexpr int kRun = kBits == 8 ? kWide : narrow_run(kBits);

  static void unpack(const Piece& p, uint8_t* values) {
    for_dword_codes<kBits>(p, [&](int half, int64_t step, int v, __m256i codes) {
      store_values<kRun>(values, half, step, v, codes);
    });
  }
};

// One table of at most 16 entries for the whole tensor.
template <int kBits>
struct Int8Table {
  static constexpr int kRun = kWide;

  static void unpack(const Piece& p, uint8_t* values) {
    const __m256i table = _mm256_broadcastsi128_si256(load128(p.tables));
    for_dword_codes<kBits>(p, [&](int half, int64_t step, int v, __m256i codes) {
      store_values<kRun>(values, half, step, v, _mm256_shuffle_epi8(table, codes));
    });
  }
};

// Tables per tile: 8 entries for each register of eight outputs.
struct Int8TileTable {
  static constexpr int kRun = kWide;

  static void unpack(const Piece& p, uint8_t* values) {
    __m256i tables[4];
    for (int i = 0; i < 2 * p.halves; ++i) {
      int64_t eight;
      memcpy(&eight, p.tables + 8 * i, 8);
      tables[i] = _mm256_set1_epi64x(eight);
    }
    for_dword_codes<3>(p, [&](int half, int64_t step, int v, __m256i codes) {
      store_values<kRun>(values, half, step, v, _mm256_shuffle_epi8(tables[2 * half + v], codes));
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
      for (int c = 0; c < 4; ++c) tables[c] = load256(p.tables + 64 * c + 32 * v);
      const uint8_t* at = p.codes + 32 * v;
      for (int64_t step = 0; step < p.columns / 4; step += 4 * kSteps, at += kRowUnitBytes<kBits>) {
        if (v == 0) prefetch_ahead(at, kRowUnitBytes<kBits>);
        for (int s = 0; s < kSteps; ++s) {
          __m256i rows[4], dwords[4];
          for (int c = 0; c < 4; ++c)
            rows[c] = _mm256_shuffle_epi8(tables[c], unit_codes<kBits, 256>(at + 64 * c, s));
          transpose_dwords(rows, dwords);
          for (int d = 0; d < 4; ++d) store_values<kRun>(values, 0, step + 4 * s + d, v, dwords[d]);
        }
      }
    }
  }
};

}  // namespace
}  // namespace qkern
